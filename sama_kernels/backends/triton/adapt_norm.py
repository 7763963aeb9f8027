"""adapt_norm: v <- D d and ||v||^2 in one pass. The formulas and their derivation: sama_kernels/ops/adapt_norm.py."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sama_kernels.backends.arguments import EXACT, check_adapt_norm_adam, check_adapt_norm_scale
from sama_kernels.backends.triton.chunks import (
    ADDRESSES,
    INDEX,
    in_chunk,
    load,
    locate,
    one_access,
    partial_sums,
    store_words,
    words_at,
)
from sama_kernels.backends.triton.launch import launch, new_slots, total
from sama_kernels.backends.triton.rounded import divide, sqrt
from sama_kernels.backends.triton.storage import compute_type, narrow
from sama_kernels.backends.triton.tables import Operands
from sama_kernels.upload import upload


def adapt_norm_adam(
    v: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    params: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr_tensor: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    mode: int,
) -> Tensor:
    """See `sama_kernels.ops.adapt_norm_adam`."""
    decay = weight_decay != 0.0
    check_adapt_norm_adam(
        v, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, params, steps, lr_tensor, weight_decay, mode
    )
    device = v[0].device
    lists = {"v": v, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if max_exp_avg_sqs:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    if decay:
        lists["params"] = params
    device_steps = steps_on_device(steps, device)
    operands = Operands("adapt_norm_adam", lists, written=("v",), others=device_steps)
    corrections = None if device_steps else upload(bias_corrections(steps, beta1, beta2), device)
    lr, lr_tensor = host_part(lr_tensor, lr, device)
    slots = new_slots(operands.programs, v[0].device)
    first = 0
    for group in operands.groups:
        noise = 8 * torch.finfo(group.dtypes[2]).eps * (1 - beta1)
        # Of its own accord ptxas takes 168 for unaligned bfloat16 with all options on sm_90, and spills 8 bytes.
        registers = {"maxnreg": 224} if decay and not group.aligned else {}
        launch(
            adam_kernel, group, slots[0, first:], corrections, lr_tensor, lr, 1 - beta1, 1 - beta2, log2(beta1),
            log2(beta2), eps, weight_decay, noise,
            EXACT=mode == EXACT, AMSGRAD=bool(max_exp_avg_sqs), DECAY=decay, MAXIMIZE=bool(maximize), **registers,
        )  # fmt: skip
        first += group.programs
    operands.copy_back()
    return total(slots)


def adapt_norm_scale(v: Sequence[Tensor], scale_tensor: Tensor | None, scale: float) -> Tensor:
    """See `sama_kernels.ops.adapt_norm_scale`."""
    check_adapt_norm_scale(v, scale_tensor)
    factor, scale_tensor = host_part(scale_tensor, 1.0, v[0].device)
    factor *= scale
    operands = Operands("adapt_norm_scale", {"v": v}, written=("v",))
    slots = new_slots(operands.programs, v[0].device)
    first = 0
    for group in operands.groups:
        write = scale_tensor is not None or factor != 1.0
        launch(scale_kernel, group, slots[0, first:], scale_tensor, factor, WRITE=write)
        first += group.programs
    operands.copy_back()
    return total(slots)


def _on_host(scalar: Tensor) -> bool:
    """Whether reading it costs no synchronisation with the GPU; the kernels read the others themselves."""
    return scalar.is_cpu


def steps_on_device(steps: Sequence[Tensor], device: torch.device) -> dict[str, Sequence[Tensor]]:
    """The step counters as `others` of `Operands`, if not all of them may be read by the host."""
    if all(map(_on_host, steps)):
        return {}
    return {"steps": [upload(t.detach(), device) for t in steps]}


def host_part(scalar: Tensor | None, value: float, device: torch.device) -> tuple[float, Tensor | None]:
    """A scalar as (its value, None) if the host may read it, else as (1, the tensor that the kernel reads)."""
    if scalar is None:
        return float(value), None
    if _on_host(scalar):
        return float(scalar.item()), None
    return 1.0, scalar.detach().to(device)


def log2(beta: float) -> float:
    return math.log2(beta) if beta > 0 else -math.inf


def bias_corrections(steps: Sequence[Tensor], beta1: float, beta2: float) -> Tensor:
    """(c1, c2, t) of every tensor, float64, on the CPU."""
    counts = [float(t.item()) for t in steps]
    known = [(1 - beta1**t, 1 - beta2**t, t) for t in dict.fromkeys(counts)]
    table = torch.tensor(known, dtype=torch.float64, device="cpu")
    if len(known) == 1:  # nearly always
        return table.expand(len(counts), 3).contiguous()
    position = {t: i for i, (_, _, t) in enumerate(known)}
    return table[torch.tensor([position[t] for t in counts], device="cpu")]


@triton.jit(do_not_specialize=["chunks", "rows", "slots", "corrections", "lr_tensor"])
def adam_kernel(
    chunks, rows, slots, corrections, lr_tensor, lr: tl.float64, one_minus_beta1: tl.float64,
    one_minus_beta2: tl.float64, log2_beta1: tl.float64, log2_beta2: tl.float64, eps: tl.float64,
    weight_decay: tl.float64, noise: tl.float64, EXACT: tl.constexpr, AMSGRAD: tl.constexpr, DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr, STORAGE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """v <- D d, and this program's part of ||v||^2 into its slot. Operands: v, g, m, w, [max w], [theta], [step]."""
    STEPS: tl.constexpr = corrections is None  # step counters on the device
    row, start, length = locate(chunks, rows, 4 + AMSGRAD + DECAY + STEPS, BLOCK * BLOCKS)
    v = words_at(row, 0, start, STORAGE[0], ALIGNED)
    g = words_at(row, 1, start, STORAGE[1], ALIGNED)
    m = words_at(row, 2, start, STORAGE[2], ALIGNED)
    w = words_at(row, 3, start, STORAGE[3], ALIGNED)
    w_max, p = w, v  # not read unless
    if AMSGRAD:
        w_max = words_at(row, 4, start, STORAGE[4], ALIGNED)
    if DECAY:
        p = words_at(row, 4 + AMSGRAD, start, STORAGE[4 + AMSGRAD], ALIGNED)
    c1, c2, _ = corrections_of(row, corrections, log2_beta1, log2_beta2, 4 + AMSGRAD + DECAY, STORAGE)
    scalars = adam_scalars(
        c1, c2, lr_tensor, lr, one_minus_beta1, one_minus_beta2, eps, weight_decay, noise, compute_type(STORAGE[0])
    )
    total = tl.zeros((BLOCK // one_access(STORAGE, 4),), dtype=tl.float64)
    full = length // BLOCK
    for i in range(full):
        total += _adam_block(
            v, g, m, w, w_max, p, i * BLOCK, length, scalars, EXACT, AMSGRAD, DECAY, MAXIMIZE, STORAGE, BLOCK, False
        )
    if full * BLOCK < length:
        total += _adam_block(
            v, g, m, w, w_max, p, full * BLOCK, length, scalars, EXACT, AMSGRAD, DECAY, MAXIMIZE, STORAGE, BLOCK, True
        )
    tl.store(slots + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def corrections_of(row, corrections, log2_beta1, log2_beta2, STEP: tl.constexpr, STORAGE: tl.constexpr):
    """c1, c2 and t of a row's tensor, float64. Without `corrections` t is operand number STEP."""
    if corrections is None:
        t = tl.load(tl.load(row + ADDRESSES + STEP).to(tl.pointer_type(STORAGE[STEP]))).to(tl.float64)
        c1 = 1.0 - tl.exp2(t * tl.full((), log2_beta1, tl.float64))
        c2 = 1.0 - tl.exp2(t * tl.full((), log2_beta2, tl.float64))
    else:
        correction = corrections + tl.load(row + INDEX) * 3
        c1, c2, t = tl.load(correction), tl.load(correction + 1), tl.load(correction + 2)
    return c1, c2, t


@triton.jit
def adam_scalars(
    c1, c2, lr_tensor, lr, one_minus_beta1, one_minus_beta2, eps, weight_decay, noise, COMPUTE: tl.constexpr
):
    """The numbers of one tensor in the compute type, computed in float64."""
    rate = tl.full((), lr, tl.float64)
    if lr_tensor is not None:
        rate *= tl.load(lr_tensor).to(tl.float64)
    rest = tl.full((), one_minus_beta1, tl.float64)
    return (
        (rate / c1).to(COMPUTE),
        (rate / (c1 * c2)).to(COMPUTE),
        (rate / c1 * rest * tl.full((), eps, tl.float64)).to(COMPUTE),
        (1.0 / tl.sqrt(c2)).to(COMPUTE),
        rest.to(COMPUTE),
        tl.full((), one_minus_beta2, tl.float64).to(COMPUTE),
        tl.full((), eps, tl.float64).to(COMPUTE),
        tl.full((), weight_decay, tl.float64).to(COMPUTE),
        tl.full((), noise, tl.float64).to(COMPUTE),
    )


@triton.jit
def _adam_block(
    v, g, m, w, w_max, p, first, length, scalars, EXACT: tl.constexpr, AMSGRAD: tl.constexpr, DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr, STORAGE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of v; returns sums of the squares of its values, float64."""
    COMPUTE: tl.constexpr = compute_type(STORAGE[0])
    d = load(v, first, length, STORAGE[0], COMPUTE, BLOCK, MASKED)
    gradient = load(g, first, length, STORAGE[1], COMPUTE, BLOCK, MASKED)
    mean = load(m, first, length, STORAGE[2], COMPUTE, BLOCK, MASKED)
    own = load(w, first, length, STORAGE[3], COMPUTE, BLOCK, MASKED)
    second, theta = own, d  # the latter is not used unless
    if AMSGRAD:
        second = load(w_max, first, length, STORAGE[4], COMPUTE, BLOCK, MASKED)
    if DECAY:
        theta = load(p, first, length, STORAGE[4 + AMSGRAD], COMPUTE, BLOCK, MASKED)
    adapted = adam_element(d, gradient, mean, own, second, theta, scalars, EXACT, AMSGRAD, DECAY, MAXIMIZE, BLOCK)
    store_words(v, first, length, narrow(adapted, STORAGE[0]), BLOCK, MASKED)
    wide = in_chunk(adapted.to(tl.float64), first, length, BLOCK, MASKED)
    return partial_sums(wide * wide, one_access(STORAGE, 4))


@triton.jit
def adam_element(
    d, gradient, mean, own, second, theta, scalars, EXACT: tl.constexpr, AMSGRAD: tl.constexpr, DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """D d for a block of elements."""
    rate, paper_rate, tail_rate, inv_sqrt_c2, one_minus_beta1, one_minus_beta2, eps, weight_decay, noise = scalars
    s = sqrt(second) * inv_sqrt_c2
    q = s + eps
    # One division serves 1/q and 1/(s q): it is the longest of all operations here.
    one = tl.full((BLOCK,), 1.0, d.dtype)
    empty = second == 0.0
    divisor = tl.where(empty, one, s)
    inv_sq = tl.where(q == 0.0, 0.0, divide(one, divisor * q))
    inv_q = inv_sq * divisor
    if MAXIMIZE:
        gradient = gradient * -1.0  # not -gradient, which is 0 - gradient in Triton: it loses the sign of zeros
    if DECAY:  # L2 decay acts on theta before the step: theta + the update that was subtracted
        gradient = gradient + weight_decay * (theta + rate * (mean * inv_q))
    part = one_minus_beta2 * (mean * gradient)
    if AMSGRAD:  # the second moment takes part in the derivative only where it is the maximum
        part = tl.where(own == second, part, 0.0)
    numerator = one_minus_beta1 * second - part  # r w
    numerator = tl.where((tl.abs(numerator) <= noise * second) | empty, 0.0, numerator)
    adapted = (paper_rate * (numerator * inv_sq)) * inv_q
    if EXACT:
        adapted = adapted + (tail_rate * inv_q) * inv_q
    adapted = adapted * d
    if MAXIMIZE:
        adapted = adapted * -1.0
    return adapted


@triton.jit(do_not_specialize=["chunks", "rows", "slots", "scale_tensor"])
def scale_kernel(
    chunks, rows, slots, scale_tensor, scale: tl.float64, WRITE: tl.constexpr,
    STORAGE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """v <- c d, and this program's part of ||v||^2 into its slot."""
    row, start, length = locate(chunks, rows, 1, BLOCK * BLOCKS)
    v = words_at(row, 0, start, STORAGE[0], ALIGNED)
    factor = tl.full((), scale, tl.float64)
    if scale_tensor is not None:
        factor *= tl.load(scale_tensor).to(tl.float64)
    factor = factor.to(compute_type(STORAGE[0]))
    total = tl.zeros((BLOCK // one_access(STORAGE, 1),), dtype=tl.float64)
    full = length // BLOCK
    for i in range(full):
        total += _scale_block(v, i * BLOCK, length, factor, WRITE, STORAGE, BLOCK, False)
    if full * BLOCK < length:
        total += _scale_block(v, full * BLOCK, length, factor, WRITE, STORAGE, BLOCK, True)
    tl.store(slots + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _scale_block(
    v, first, length, factor, WRITE: tl.constexpr, STORAGE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    scaled = load(v, first, length, STORAGE[0], compute_type(STORAGE[0]), BLOCK, MASKED) * factor
    if WRITE:
        store_words(v, first, length, narrow(scaled, STORAGE[0]), BLOCK, MASKED)
    wide = in_chunk(scaled.to(tl.float64), first, length, BLOCK, MASKED)
    return partial_sums(wide * wide, one_access(STORAGE, 1))
