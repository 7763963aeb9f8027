"""perturb: theta -> theta+ -> theta- in place; v's storage keeps the XOR bits. See sama_kernels/ops/perturb.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sama_kernels.backends.arguments import MINUS, STOCHASTIC, check_perturb
from sama_kernels.backends.triton.chunks import (
    INDEX,
    in_chunk,
    load_words,
    locate,
    one_access,
    partial_sums,
    store_words,
    words_at,
)
from sama_kernels.backends.triton.launch import launch, sum_slots
from sama_kernels.backends.triton.restore import restore_group
from sama_kernels.backends.triton.storage import compute_type, narrow, narrow_stochastically, widen
from sama_kernels.backends.triton.tables import Group, Operands

_NARROW = (torch.bfloat16, torch.float16)


def perturb(
    params: Sequence[Tensor], v: Sequence[Tensor], epsilon: Tensor, side: int, rounding: int, seed: int, measure: bool
) -> Tensor:
    """See `sama_kernels.ops.perturb`."""
    check_perturb(params, v, epsilon, side, rounding)
    operands = Operands("perturb", {"params": params, "v": v}, written=("params", "v"))
    if side == MINUS:  # a tensor is done or not: `restore` puts either back
        for group in operands.groups:
            launch(minus_kernel, group)
        operands.copy_back()
        return _two(torch.nan, epsilon)
    slots = torch.empty((2, operands.programs), dtype=torch.float64, device=epsilon.device) if measure else None
    _move_to_plus(operands.groups, epsilon, rounding, seed, slots)
    operands.copy_back()
    if slots is None:
        return _two(torch.nan, epsilon)
    return sum_slots(slots) if slots.numel() else _two(0.0, epsilon)


def _two(value: float, like: Tensor) -> Tensor:
    return torch.full((2,), value, dtype=torch.float64, device=like.device)


def _move_to_plus(groups: Sequence[Group], epsilon: Tensor, rounding: int, seed: int, slots: Tensor | None) -> None:
    """All groups or, if a launch fails (a kernel that does not compile, say), none of them."""
    done: list[Group] = []
    first = 0
    try:
        for group in groups:
            stochastic = rounding == STOCHASTIC and group.dtypes[0] in _NARROW
            along, squares = (None, None) if slots is None else (slots[0, first:], slots[1, first:])
            launch(plus_kernel, group, epsilon.to(group.rows.device), seed, along, squares, STOCHASTIC=stochastic)
            done.append(group)
            first += group.programs
    except BaseException:
        for group in done:
            restore_group(group)
        raise


@triton.jit(do_not_specialize=["chunks", "rows", "epsilon", "seed", "along", "squares"])
def plus_kernel(
    chunks, rows, epsilon, seed: tl.int64, along, squares, STOCHASTIC: tl.constexpr,
    STORAGE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """theta+ and the XOR bits; and, with slots `along` and `squares`, this program's part of what was realised."""
    MEASURE: tl.constexpr = along is not None
    row, start, length = locate(chunks, rows, 2, BLOCK * BLOCKS)
    p = words_at(row, 0, start, STORAGE[0], ALIGNED)
    v = words_at(row, 1, start, STORAGE[0], ALIGNED)
    tensor = tl.load(row + INDEX)
    step = tl.load(epsilon)
    along_sum = tl.zeros((BLOCK // one_access(STORAGE, 1),), dtype=tl.float64)
    squares_sum = along_sum
    full = length // BLOCK
    for i in range(full):
        products, squared = _plus_block(
            p, v, i * BLOCK, length, start, tensor, step, seed, STOCHASTIC, MEASURE, STORAGE, BLOCK, False
        )
        along_sum += products
        squares_sum += squared
    if full * BLOCK < length:
        products, squared = _plus_block(
            p, v, full * BLOCK, length, start, tensor, step, seed, STOCHASTIC, MEASURE, STORAGE, BLOCK, True
        )
        along_sum += products
        squares_sum += squared
    if MEASURE:
        tl.store(along + tl.program_id(0), tl.sum(along_sum, axis=0))
        tl.store(squares + tl.program_id(0), tl.sum(squares_sum, axis=0))


@triton.jit
def _plus_block(
    p, v, first, length, start, tensor, step, seed, STOCHASTIC: tl.constexpr, MEASURE: tl.constexpr,
    STORAGE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Returns partial sums of <s, epsilon v> and ||s||^2; zeros without MEASURE, which the compiler drops."""
    COMPUTE: tl.constexpr = compute_type(STORAGE[0])
    GROUP: tl.constexpr = one_access(STORAGE, 1)
    old = load_words(p, first, length, BLOCK, MASKED)
    intended = step.to(COMPUTE) * widen(load_words(v, first, length, BLOCK, MASKED), STORAGE[0], COMPUTE)
    centre = widen(old, STORAGE[0], COMPUTE)
    if STOCHASTIC:
        moved = narrow_stochastically(centre + intended, _random(seed, tensor, start + first, BLOCK), STORAGE[0])
    else:
        moved = narrow(centre + intended, STORAGE[0])
    moved = tl.where(step == 0.0, old, moved)  # "leave theta alone", also where v is Inf or NaN
    store_words(v, first, length, old ^ moved, BLOCK, MASKED)
    store_words(p, first, length, moved, BLOCK, MASKED)
    if MEASURE:
        # In float64: the difference of two numbers far apart is not exact in their own precision.
        realised = widen(moved, STORAGE[0], COMPUTE).to(tl.float64) - centre.to(tl.float64)
        realised = in_chunk(tl.where(step == 0.0, 0.0, realised), first, length, BLOCK, MASKED)
        wanted = in_chunk(tl.where(step == 0.0, 0.0, intended.to(tl.float64)), first, length, BLOCK, MASKED)
        return partial_sums(realised * wanted, GROUP), partial_sums(realised * realised, GROUP)
    else:
        nothing = tl.zeros((BLOCK // GROUP,), dtype=tl.float64)
        return nothing, nothing


@triton.jit
def _random(seed, tensor, start, BLOCK: tl.constexpr):
    """16 random bits for each of the elements [start, start + BLOCK) of a tensor (backends/rounding.py).

    Eight elements share the four words of one Philox call, which one thread makes for its own eight elements: as a
    tensor of (BLOCK / 8, 2, 2, 2) - bits of the word's number, then low or high half - that lies flat in memory order.
    """
    number = (start // 8 + tl.arange(0, BLOCK // 8)).to(tl.uint64)
    low, high = number.to(tl.uint32), (number >> 32).to(tl.uint32)
    zero = tl.zeros((BLOCK // 8,), dtype=tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed.to(tl.uint64), low, high, zero + tensor.to(tl.uint32), zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK,))


@triton.jit(do_not_specialize=["chunks", "rows"])
def minus_kernel(chunks, rows, STORAGE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """theta- = theta - (theta+ - theta) from theta+ and the XOR bits."""
    row, start, length = locate(chunks, rows, 2, BLOCK * BLOCKS)
    p = words_at(row, 0, start, STORAGE[0], ALIGNED)
    v = words_at(row, 1, start, STORAGE[0], ALIGNED)
    full = length // BLOCK
    for i in range(full):
        _minus_block(p, v, i * BLOCK, length, STORAGE[0], BLOCK, False)
    if full * BLOCK < length:
        _minus_block(p, v, full * BLOCK, length, STORAGE[0], BLOCK, True)


@triton.jit
def _minus_block(p, v, first, length, STORAGE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    COMPUTE: tl.constexpr = compute_type(STORAGE)
    plus = load_words(p, first, length, BLOCK, MASKED)
    difference = load_words(v, first, length, BLOCK, MASKED)
    centre = plus ^ difference
    at = widen(centre, STORAGE, COMPUTE)
    mirrored = narrow(at - (widen(plus, STORAGE, COMPUTE) - at), STORAGE)
    moved = tl.where(difference == 0, centre, mirrored)
    store_words(v, first, length, centre ^ moved, BLOCK, MASKED)
    store_words(p, first, length, moved, BLOCK, MASKED)
