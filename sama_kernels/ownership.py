"""Gradients that autograd returned, in memory of their own, so that the ops may work in place on them."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from sama_kernels.distributed.sharded import local


def own(
    grads: list[Tensor | None], like: Sequence[Tensor], owned: Collection[int] = frozenset()
) -> list[Tensor | None]:
    """`grads` where nobody else can see them, without a copy in the usual case.

    autograd may hand out one buffer for two inputs, an expanded scalar, or a tensor that a custom backward still
    holds. Those are copied into the layout of `like`; all others (every gradient of a transformer) are taken as they
    are. Of DTensors `grads` are this rank's parts. `grads` itself must be the only list that holds them. The rows
    `owned` are ours already.
    """
    # Measured here and now: the counts differ between versions of torch and Python, and where torch.compile has
    # replaced Python's own evaluation of frames.
    plain, view = _calibrate([torch.ones(2, device="cpu")]), _calibrate([torch.ones(2, device="cpu").view(2)])
    result: list[Tensor | None] = []
    storages: set[int] = set()
    for i in range(len(grads)):
        grad = grads[i]
        if grad is not None and i not in owned:
            counts, storage = _references(grad)
            exclusive = counts == (view if grad._is_view() else plain)
            shared = storage != 0 and storage in storages  # 0: without elements, as the parts of small DTensors may be
            overlaps = not grad.is_contiguous() and torch._debug_has_internal_overlap(grad) != 0
            if not exclusive or shared or overlaps:
                grad = torch.empty_like(local(like[i]), requires_grad=False).copy_(grad)
                storage = grad.untyped_storage().data_ptr()
            storages.add(storage)
        result.append(grad)
    return result


def _references(grad: Tensor) -> tuple[tuple[int, ...], int]:
    """How many references Python and C++ hold to the tensor, to the tensor it is a view of, and to their memory; and
    where that is."""
    base = grad._base
    storage = grad.untyped_storage()
    counts = (
        sys.getrefcount(grad),
        grad._use_count(),  # type: ignore[attr-defined]
        sys.getrefcount(base) if base is not None else 0,
        base._use_count() if base is not None else 0,  # type: ignore[attr-defined]
        torch._C._storage_Use_Count(storage._cdata),
    )
    return counts, storage.data_ptr()


def _calibrate(fresh: list[Tensor]) -> tuple[int, ...]:
    """The counts of a tensor that only a list holds."""
    grad = fresh[0]
    return _references(grad)[0]
