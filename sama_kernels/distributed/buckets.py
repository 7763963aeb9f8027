"""Flat memory for many gradients, so that a collective moves megabytes at a time instead of single tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MIB = 2**20


@dataclass
class Bucket:
    """Some tensors of one dtype in one piece of memory.

    Attributes:
        rows: their positions in the list that was divided.
        flat: the memory, 1-dim.
        views: one per row, in the tensor's shape, row-major.
        missing: rows whose gradient has not come yet.
    """

    rows: list[int]
    flat: Tensor
    views: list[Tensor]
    missing: set[int] = field(default_factory=set)


def divide(like: Sequence[Tensor], mib: float) -> list[Bucket]:
    """Buckets for gradients of `like`, zero-filled, each of one dtype and up to `mib` MiB (or one tensor).

    In reverse order: the backward pass reaches the last parameters first. The order depends on shapes and dtypes alone,
    so that all ranks agree on it.
    """
    runs: list[list[int]] = []
    open_run: dict[torch.dtype, list[int]] = {}
    room: dict[torch.dtype, float] = {}
    for row in reversed(range(len(like))):
        dtype, size = like[row].dtype, like[row].numel() * like[row].element_size()
        if dtype not in open_run or room[dtype] < size:
            open_run[dtype] = []
            room[dtype] = mib * MIB
            runs.append(open_run[dtype])
        open_run[dtype].append(row)
        room[dtype] -= size
    return [_bucket(rows, like) for rows in runs]


def _bucket(rows: list[int], like: Sequence[Tensor]) -> Bucket:
    sizes = [like[row].numel() for row in rows]
    first = like[rows[0]]
    flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
    views = [part.view(like[row].shape) for row, part in zip(rows, torch.split(flat, sizes), strict=True)]
    return Bucket(rows, flat, views, set(rows))
