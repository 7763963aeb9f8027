"""Flat memory for many gradients, so that a collective moves megabytes at a time instead of single tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

MIB = 2**20


class Bucket:
    """Some tensors of one dtype in one piece of memory.

    It has the methods of `torch.distributed.GradBucket` that communication hooks use.

    Attributes:
        rows: which of the tensors that were divided.
        flat: the memory, 1-dim.
        views: one per row, in the tensor's shape, row-major.
        missing: rows whose gradient has not come yet.
    """

    def __init__(
        self, rows: list[int], like: Mapping[int, Tensor], device: torch.device, index: int, count: int
    ) -> None:
        self.rows = rows
        self.missing = set(rows)
        self._shapes, self._dtype, self._device = [like[row].shape for row in rows], like[rows[0]].dtype, device
        self._index, self._last = index, index == count - 1

    @cached_property
    def flat(self) -> Tensor:
        """Not initialised, and made when it is first used: before, the forward pass needs the memory."""
        return torch.empty(sum(shape.numel() for shape in self._shapes), dtype=self._dtype, device=self._device)

    @cached_property
    def views(self) -> list[Tensor]:
        """Parts of `flat`."""
        parts = torch.split(self.flat, [shape.numel() for shape in self._shapes])
        return [part.view(shape) for shape, part in zip(self._shapes, parts, strict=True)]

    def zero_missing(self) -> None:
        """Gradients that did not come count as zeros."""
        for row, view in zip(self.rows, self.views, strict=True):
            if row in self.missing:
                view.zero_()

    def buffer(self) -> Tensor:
        """`flat`."""
        return self.flat

    def set_buffer(self, flat: Tensor) -> None:
        """Overwrite `flat`."""
        self.flat.copy_(flat)

    def gradients(self) -> list[Tensor]:
        """`views`."""
        return self.views

    def index(self) -> int:
        """The position in the order in which buckets are sent."""
        return self._index

    def is_last(self) -> bool:
        """Whether it is sent last."""
        return self._last


def divide(like: Mapping[int, Tensor], device: torch.device, mib: float) -> list[Bucket]:
    """Buckets on `device` for gradients of `like` (by row), each of one dtype and up to `mib` MiB or one tensor.

    In reverse order: the backward pass reaches the last parameters first. The order depends on shapes and dtypes alone,
    so that all ranks agree on it.
    """
    runs: list[list[int]] = []
    open_run: dict[torch.dtype, list[int]] = {}
    room: dict[torch.dtype, float] = {}
    for row in sorted(like, reverse=True):
        dtype, size = like[row].dtype, like[row].numel() * like[row].element_size()
        if dtype not in open_run or room[dtype] < size:
            open_run[dtype] = []
            room[dtype] = mib * MIB
            runs.append(open_run[dtype])
        open_run[dtype].append(row)
        room[dtype] -= size
    return [Bucket(rows, like, device, index, len(runs)) for index, rows in enumerate(runs)]
