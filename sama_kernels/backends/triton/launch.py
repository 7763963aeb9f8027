"""Starting kernels, and the second stage of their sums."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sama_kernels.backends.triton.storage import LANGUAGE_TYPES
from sama_kernels.backends.triton.tables import Group

# No fused multiply-add: the same operations as in the reference, hence the same bits where only + - * / and the square
# root are involved.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_SUM_BLOCK = 1024


def launch(kernel: Any, group: Group, *arguments: Any, **constants: Any) -> None:
    """Run `kernel(chunks, rows, *arguments)`, one program per chunk of `group`."""
    constants |= {
        "STORAGE": tuple(LANGUAGE_TYPES[dtype] for dtype in group.dtypes),
        "ALIGNED": group.aligned,
        "BLOCK": group.block,
        "BLOCKS": group.blocks,
    }
    run(kernel, group.programs, group.chunks, group.rows, *arguments, **constants)


def run(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on the device of its first argument, on the current stream."""
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*arguments, **constants, **OPTIONS)


def sum_slots(slots: Tensor) -> Tensor:
    """The sum of each row of `slots`, float64 (rows, programs), on its device; always in the same order."""
    sums = torch.empty(slots.shape[:1], dtype=torch.float64, device=slots.device)
    run(sum_kernel, slots.shape[0], slots, sums, slots.shape[1], BLOCK=_SUM_BLOCK)
    return sums


def new_slots(programs: int, device: torch.device) -> Tensor:
    """Where the programs of an `adapt_norm` op put their parts of ||v||^2, shape (1, programs)."""
    return torch.empty((1, programs), dtype=torch.float64, device=device)


def total(slots: Tensor) -> Tensor:
    """The sum of a single row of slots, 0-dim; 0 if it has none."""
    return sum_slots(slots).reshape(()) if slots.numel() else slots.new_zeros(())


@triton.jit(do_not_specialize=["slots", "sums", "count"])
def sum_kernel(slots, sums, count: tl.int64, BLOCK: tl.constexpr):
    """Program i adds up row i: one float64 per program of the first stage, so that no atomics are needed."""
    row = slots + tl.program_id(0) * count
    partial = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, count, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        partial += tl.load(row + slot, mask=slot < count, other=0.0)
    tl.store(sums + tl.program_id(0), tl.sum(partial, axis=0))
