"""`adapt_norm_low_bit_adam`: its arguments, and the moments of one tensor in plain PyTorch.

The derivation: sama_kernels/ops/adapt_norm_low_bit.py. The compiled kernels have their own checks, with the same
messages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sama_kernels.backends.arguments import EXACT, PAPER, check_lists, check_scalar, check_scalars

BYTE_CODES, PACKED_CODES = 256, 16
"""Entries of a lookup table: of codes of 8 bits, and of 4 bits, two in a byte, the first in its upper half."""
_MOST_PER_SCALE = 2**30
_OP = "adapt_norm_low_bit_adam"

Stored = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]
"""A moment of all tensors as it is stored: codes, scales, lookup tables."""


def check_adapt_norm_low_bit_adam(
    v: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Stored,
    exp_avg_sqs: Stored,
    steps: Sequence[Tensor],
    block_size: int,
    lr_tensor: Tensor | None,
    mode: int,
) -> None:
    """All that can be checked without reading a value."""
    if not v:
        raise RuntimeError(f"sama::{_OP}: v is empty")
    if mode not in (PAPER, EXACT):
        raise RuntimeError(f"sama::{_OP}: mode must be 0 (paper) or 1 (exact), not {mode}")
    if not 1 <= block_size <= _MOST_PER_SCALE:
        raise RuntimeError(f"sama::{_OP}: block_size must be from 1 to 2^30, not {block_size}")
    if len(steps) != len(v):
        raise RuntimeError(f"sama::{_OP}: steps has {len(steps)} tensors, but v has {len(v)}")
    check_lists(_OP, {"v": v, "grads": grads}, written=("v",))
    moments = {"exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs}
    for name, stored in moments.items():
        for part, tensors, dtype in zip(_PARTS, stored, (torch.uint8, torch.float32, torch.float32), strict=True):
            _check_flat(f"{name}_{part}", tensors, dtype, len(v))
    entries = exp_avgs[2][0].numel()
    for name, stored in moments.items():
        for i, parts in enumerate(zip(*stored, strict=True)):
            _check_numbers(name, i, parts, v[i].numel(), entries, block_size)
    check_scalars(_OP, "steps", steps)
    if lr_tensor is not None:
        check_scalar(_OP, "lr_tensor", lr_tensor)


_PARTS = ("codes", "scales", "tables")


def _check_flat(name: str, tensors: Sequence[Tensor], dtype: torch.dtype, count: int) -> None:
    if len(tensors) != count:
        raise RuntimeError(f"sama::{_OP}: {name} has {len(tensors)} tensors, but v has {count}")
    for i, x in enumerate(tensors):
        if x.dtype != dtype:
            raise RuntimeError(f"sama::{_OP}: {name}[{i}] is not {str(dtype).removeprefix('torch.')}")
        if not x.is_contiguous():
            raise RuntimeError(f"sama::{_OP}: {name}[{i}] is not contiguous")


def _check_numbers(name: str, i: int, parts: tuple[Tensor, ...], numel: int, entries: int, block_size: int) -> None:
    codes, scales, table = (x.numel() for x in parts)
    bytes_needed = (numel + 1) // 2 if entries == PACKED_CODES else numel
    blocks = -(-numel // block_size)
    if table not in (BYTE_CODES, PACKED_CODES):
        fault = f"{name}_tables[{i}] must have 256 entries, or 16 for codes of 4 bits, not {table}"
    elif table != entries:
        fault = f"{name}_tables[{i}] has {table} entries, but exp_avg_tables[0] has {entries}"
    elif codes != bytes_needed:
        fault = f"{name}_codes[{i}] has {codes} bytes, but v[{i}] needs {bytes_needed}"
    elif scales != blocks:
        fault = f"{name}_scales[{i}] has {scales} numbers, but v[{i}] has {blocks} blocks of {block_size}"
    else:
        return
    raise RuntimeError(f"sama::{_OP}: {fault}")


def known_moments(
    exp_avgs: Stored, exp_avg_sqs: Stored, i: int, grad: Tensor, t: Tensor, block_size: int, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """m and w of tensor i, in the dtype and the shape of its gradient: dequantised, and with what is known exactly put
    right. All of it at the first step; later that w was no smaller than the term which this step added."""
    m, w = (_dequantised([part[i] for part in stored], grad, block_size) for stored in (exp_avgs, exp_avg_sqs))
    added = (1 - beta2) * (grad * grad)
    first = t.to(grad.device) == 1
    return torch.where(first, (1 - beta1) * grad, m), torch.where(first, added, torch.maximum(w, added))


def _dequantised(stored: Sequence[Tensor], like: Tensor, block_size: int) -> Tensor:
    codes, scales, table = (x.flatten() for x in stored)
    if table.numel() == PACKED_CODES:
        codes = torch.stack([codes >> 4, codes & 15], dim=-1).flatten()[: like.numel()]
    block = torch.arange(like.numel(), device=like.device) // block_size
    return (table[codes.int()] * scales[block]).view(like.shape).to(like.dtype)
