"""What the ranks exchange in one meta step: a fixed sequence of collectives, the same on every rank.

    the sum of the weights, if there are any
    the direct gradient d, where v has to be the same everywhere
    the meta gradient
    the status

A rank whose closure raises goes through the rest of the sequence with what it has, and says so in the status; the
others then raise as well, instead of waiting for it for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sama_kernels.distributed.agreement import Status, agree, describe
from sama_kernels.distributed.buckets import Bucket
from sama_kernels.distributed.reduction import OverlappedReduction

BUCKET_MIB = 25.0
"""As in DistributedDataParallel."""

Difference = Callable[[list[int], list[Tensor]], None]
"""(rows, memory): turns the gradients of pass 2 that lie in `memory` into this rank's meta gradient of these rows."""


class Exchange:
    """One meta step's exchange over the ranks of `group`. A context manager: leaving it with an error tells the others.

    Arguments:
        base_params, meta_params: theta and lambda of this rank; shapes and dtypes must agree over the ranks.
        direct: whether the direct gradient is averaged too, so that v, epsilon, theta+- are the same bits everywhere.
        weight: (of the base batch, of the meta batch) of this rank, for instance their sizes; None: all ranks alike.
        options: further settings that must agree, by argument name.
    Attributes:
        shares: this rank's parts of the averages over (base, meta) batches, float64, shape (2,).
    """

    def __init__(
        self,
        group: Any,
        base_params: Sequence[Tensor],
        meta_params: Sequence[Tensor],
        *,
        direct: bool,
        weight: tuple[float, float] | None = None,
        options: dict[str, Any] | None = None,
        mib: float = BUCKET_MIB,
    ) -> None:
        agree(
            group,
            {
                "base_params": describe(base_params),
                "meta_params": describe(meta_params),
                "sync": direct,
                "weight": weight is not None,
                **(options or {}),
            },
        )
        device = base_params[0].device
        self.shares = _shares(weight, group, device)
        self._status = Status(group, device)
        self._direct = OverlappedReduction(base_params, group, mib) if direct else None
        self._final = OverlappedReduction(meta_params, group, mib, prepare=self._subtract)
        self._difference: Difference | None = None

    # The direct gradient.

    @contextmanager
    def direct_gradient(self, params: Sequence[Tensor]) -> Iterator[None]:
        """Around the backward pass of the meta loss: gradients of `params` are averaged over the ranks as they appear.

        The gradients that autograd returns are then the averages, in the memory of the buckets, once `await_direct` has
        been called.
        """
        reduction = self._direct
        if reduction is None:
            yield
            return

        def into_bucket(row: int) -> Callable[[Tensor], Tensor]:
            def hook(grad: Tensor) -> Tensor:
                view = reduction.view(row)
                torch.mul(grad, self.shares[1], out=view)
                reduction.ready(row)
                return view

            return hook

        with _hooks(params, into_bucket):
            yield

    def await_direct(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        """The averaged direct gradient, one tensor per base parameter; `grads` without `direct`."""
        if self._direct is None:
            return grads
        self._direct.wait()
        return list(self._direct.views())

    # The meta gradient.

    def begin_final(self, plus: Sequence[Tensor | None], difference: Difference) -> None:
        """Before pass 3: the gradients of pass 2 go into the buckets."""
        for row, grad in enumerate(plus):
            if grad is not None:
                self._final.view(row).copy_(grad)
        self._difference = difference

    @contextmanager
    def final_gradient(self, params: Sequence[Tensor], take: Callable[[int, Tensor], None]) -> Iterator[None]:
        """Around the last backward pass of pass 3: `take(row, grad)` gets each gradient as it appears; when a bucket is
        complete, its difference is formed and sent while the backward pass goes on."""

        def send(row: int) -> Callable[[Tensor], None]:
            def hook(grad: Tensor) -> None:
                take(row, grad)
                self._final.ready(row)

            return hook

        with _hooks(params, send):
            yield

    def await_final(self, degenerate: Tensor, finite: Tensor) -> tuple[list[Tensor], Tensor]:
        """The averaged meta gradient and whether it is degenerate, which is the same on all ranks.

        Raises:
            RuntimeError: on every rank, if a closure raised on one.
        """
        self._final.wait()
        self._status.report(degenerate=degenerate, finite=finite)
        failed = self._status.failed_ranks()
        if failed:
            raise RuntimeError(
                f"sync: the meta step failed on rank {', '.join(map(str, failed))}; see the error there. The parameters"
                " of this rank are what they were"
            )
        degenerate = self._status.degenerate()
        return self._final.views(), degenerate

    def __enter__(self) -> Exchange:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not self._status.reported:
            self._difference = None
            if self._direct is not None:
                self._direct.wait()
            self._final.wait()
            self._status.report(failed=True)

    def _subtract(self, bucket: Bucket) -> None:
        if self._difference is not None:
            self._difference(bucket.rows, bucket.views)
            bucket.flat.mul_(self.shares[0])


def _shares(weight: tuple[float, float] | None, group: Any, device: torch.device) -> Tensor:
    """This rank's parts of the (base, meta) averages, float64, shape (2,), summing to 1 over the ranks."""
    if weight is None:
        return torch.full((2,), 1 / dist.get_world_size(group), dtype=torch.float64, device=device)
    own = torch.tensor(weight, dtype=torch.float64, device=device)
    total = own.clone()
    dist.all_reduce(total, group=group)
    return own / total


@contextmanager
def _hooks(params: Sequence[Tensor], hook_of: Callable[[int], Callable[[Tensor], Any]]) -> Iterator[None]:
    handles = [p.register_hook(hook_of(row)) for row, p in enumerate(params)]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
