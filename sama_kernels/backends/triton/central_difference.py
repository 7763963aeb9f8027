"""central_difference: the meta gradient from the two perturbed passes. See sama_kernels/ops/central_difference.py."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from sama_kernels.backends.arguments import check_central_difference
from sama_kernels.backends.triton.chunks import load, locate, store_words, words_at
from sama_kernels.backends.triton.launch import launch
from sama_kernels.backends.triton.storage import compute_type, narrow
from sama_kernels.backends.triton.tables import Operands


def central_difference(
    grads_plus: Sequence[Tensor],
    grads_minus: Sequence[Tensor],
    explicit: Sequence[Tensor],
    epsilon: Tensor,
    norm: Tensor,
) -> None:
    """See `sama_kernels.ops.central_difference`."""
    check_central_difference(grads_plus, grads_minus, explicit, epsilon, norm)
    lists = {"grads_plus": grads_plus, "grads_minus": grads_minus}
    if explicit:
        lists["explicit"] = explicit
    operands = Operands("central_difference", lists, written=("grads_plus",))
    for group in operands.groups:
        scalars = (x.to(operands.device) for x in (epsilon, norm))
        launch(difference_kernel, group, *scalars, EXPLICIT=bool(explicit))
    operands.copy_back()


@triton.jit(do_not_specialize=["chunks", "rows", "epsilon", "norm"])
def difference_kernel(
    chunks, rows, epsilon, norm, EXPLICIT: tl.constexpr,
    STORAGE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row, start, length = locate(chunks, rows, 2 + EXPLICIT, BLOCK * BLOCKS)
    plus = words_at(row, 0, start, STORAGE[0], ALIGNED)
    minus = words_at(row, 1, start, STORAGE[1], ALIGNED)
    if EXPLICIT:
        extra = words_at(row, 2, start, STORAGE[2], ALIGNED)
    else:
        extra = plus  # not read
    step = tl.load(epsilon)
    degenerate = step == 0.0
    factor = tl.where(degenerate, 0.0, -0.5 / step).to(compute_type(STORAGE[0]))
    size = tl.load(norm)
    finite = (size == size) & (tl.abs(size) != float("inf"))
    full = length // BLOCK
    for i in range(full):
        _block(plus, minus, extra, i * BLOCK, length, factor, degenerate, finite, EXPLICIT, STORAGE, BLOCK, False)
    if full * BLOCK < length:
        _block(plus, minus, extra, full * BLOCK, length, factor, degenerate, finite, EXPLICIT, STORAGE, BLOCK, True)


@triton.jit
def _block(
    plus, minus, extra, first, length, factor, degenerate, finite,
    EXPLICIT: tl.constexpr, STORAGE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    COMPUTE: tl.constexpr = compute_type(STORAGE[0])
    a = load(plus, first, length, STORAGE[0], COMPUTE, BLOCK, MASKED)
    b = load(minus, first, length, STORAGE[1], COMPUTE, BLOCK, MASKED)
    result = tl.where(degenerate, 0.0, (a - b) * factor)
    if EXPLICIT:
        result += tl.where(finite, load(extra, first, length, STORAGE[2], COMPUTE, BLOCK, MASKED), 0.0)
    store_words(plus, first, length, narrow(result, STORAGE[0]), BLOCK, MASKED)
