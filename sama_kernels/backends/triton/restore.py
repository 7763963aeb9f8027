"""restore: theta back from theta+ or theta- by XOR. See sama_kernels/ops/restore.py."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from sama_kernels.backends.arguments import check_restore
from sama_kernels.backends.triton.chunks import load_words, locate, store_words, words_at
from sama_kernels.backends.triton.launch import launch
from sama_kernels.backends.triton.tables import Group, Operands


def restore(params: Sequence[Tensor], v: Sequence[Tensor]) -> None:
    """See `sama_kernels.ops.restore`."""
    check_restore(params, v)
    operands = Operands("restore", {"params": params, "v": v}, written=("params",))
    for group in operands.groups:
        restore_group(group)
    operands.copy_back()


def restore_group(group: Group) -> None:
    """One launch; the operands of `group` are params and v."""
    launch(restore_kernel, group)


@triton.jit(do_not_specialize=["chunks", "rows"])
def restore_kernel(
    chunks, rows, STORAGE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    row, start, length = locate(chunks, rows, 2, BLOCK * BLOCKS)
    p = words_at(row, 0, start, STORAGE[0], ALIGNED)
    v = words_at(row, 1, start, STORAGE[0], ALIGNED)
    full = length // BLOCK
    for i in range(full):
        _block(p, v, i * BLOCK, length, BLOCK, False)
    if full * BLOCK < length:
        _block(p, v, full * BLOCK, length, BLOCK, True)


@triton.jit
def _block(p, v, first, length, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    bits = load_words(p, first, length, BLOCK, MASKED) ^ load_words(v, first, length, BLOCK, MASKED)
    store_words(p, first, length, bits, BLOCK, MASKED)
