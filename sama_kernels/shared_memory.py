"""Which tensors lie in the same memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from sama_kernels.distributed.sharded import local, locals_of

_known_apart: set[tuple[object, ...]] = set()
"""Places of tensors whose cells were looked at one by one, and are no other's."""


class Memory:
    """Where tensors lie; `x in memory`: whether x shares some of it. Tensors without memory of their own never do."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._at: dict[int, list[Tensor]] | None = None  # most models have no buffers that could be meant

    def __contains__(self, x: Tensor) -> bool:
        if not x.is_floating_point() or type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided:
            return False
        if self._at is None:
            self._at = {}
            for p in map(local, self._tensors):
                self._at.setdefault(p.untyped_storage().data_ptr(), []).append(p)
        tensors = self._at.get(x.untyped_storage().data_ptr())
        if tensors is None:
            return False
        start, end = span(x)
        return any(start < other_end and other_start < end for other_start, other_end in map(span, tensors))


def span(x: Tensor) -> tuple[int, int]:
    """The addresses of the first byte of a strided tensor and of the one behind its last."""
    if x.is_contiguous():
        start = x.data_ptr()
        return start, start + x.nbytes
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + ((last + 1) * x.element_size() if x.numel() else 0)


def apart(base_params: Sequence[Tensor]) -> None:
    """Raise if two base parameters share memory: it would move twice. (Tied weights are one tensor, and no matter.)"""
    for rows in _neighbours(base_params):
        pair = _sharing([local(base_params[row]) for row in rows])
        if pair is not None:
            i, j = sorted(rows[k] for k in pair)
            raise ValueError(
                f"base_params: tensors {i} and {j} (shape {tuple(base_params[j].shape)}) are two parameters in the same"
                " memory; tie weights by assigning the parameter itself (a.weight = b.weight), not its .data"
            )


def separate(base_params: Sequence[Tensor], meta_params: Sequence[Tensor]) -> None:
    """Raise if a meta parameter lies in the memory of a base parameter: it would move with theta."""
    theta = Memory(base_params)
    for i, x in enumerate(map(local, meta_params)):
        if x in theta:
            raise ValueError(
                f"meta_params: tensor {i} (shape {tuple(x.shape)}) lies in the memory of a base parameter, with which"
                " it would move in the perturbed passes; give it memory of its own (.clone())"
            )


def _neighbours(params: Sequence[Tensor]) -> Iterator[list[int]]:
    """The rows of tensors whose spans overlap, together; views of one tensor may do so without sharing a cell."""
    spans = sorted((*span(x), row) for row, x in enumerate(locals_of(params)) if x.numel())
    rows: list[int] = []
    reached = 0
    for start, end, row in spans:
        if start >= reached:
            if len(rows) > 1:
                yield rows
            rows = []
        rows.append(row)
        reached = max(reached, end)
    if len(rows) > 1:
        yield rows


def _sharing(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Two of the tensors that have a cell in common; found on the CPU, from their strides."""
    places = tuple((x.data_ptr(), x.dtype, x.shape, x.stride()) for x in tensors)
    if places in _known_apart:
        return None
    start, end = min(span(x)[0] for x in tensors), max(span(x)[1] for x in tensors)
    unit = min(x.element_size() for x in tensors)
    owner = torch.full(((end - start) // unit,), -1, dtype=torch.int32, device="cpu")
    for k, x in enumerate(tensors):
        parts = x.element_size() // unit
        shape, strides = (*x.shape, parts), (*(stride * parts for stride in x.stride()), 1)
        cells = owner.as_strided(shape, strides, (x.data_ptr() - start) // unit)
        taken = int(cells.max())
        if taken >= 0:
            return taken, k
        cells.fill_(k)
    if len(_known_apart) >= 64:  # models that are gone
        _known_apart.clear()
    _known_apart.add(places)
    return None
