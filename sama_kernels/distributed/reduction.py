"""All-reduce that starts while the backward pass is still running (paper, section 3.3 and Figure 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sama_kernels.distributed.buckets import Bucket, divide

Work = Callable[[Bucket], None]
CommHook = Callable[[Any, Any], "torch.futures.Future[Tensor]"]
"""(process group, bucket) -> a future of the average over the ranks: DistributedDataParallel's communication hooks."""


class OverlappedReduction:
    """Sums gradients over the ranks of a group, bucket by bucket.

    A bucket's all-reduce is launched the moment its last gradient is there, on a stream of its own, beside the rest of
    the backward pass. Buckets are launched in one order on every rank, whatever order the gradients come in, because
    collectives have to match. At the end the compute stream waits for the events of the side stream, and the host for
    nothing (with gloo, whose collectives run on the host, it has to).

    Arguments:
        like: tensors such as the gradients that are summed, by the row that they have for the caller.
        device: where the gradients are.
        prepare: last work on a bucket before it is sent, on the side stream.
        arrived: first work on the sum, likewise.
        comm_hook: reduces a bucket instead of `torch.distributed.all_reduce`, and averages instead of summing.
    Attributes:
        rows: the keys of `like`.
        broken: a collective raised, so that no other can succeed.
    """

    def __init__(
        self,
        like: Mapping[int, Tensor],
        device: torch.device,
        group: Any,
        mib: float,
        *,
        prepare: Work | None = None,
        arrived: Work | None = None,
        comm_hook: CommHook | None = None,
    ) -> None:
        self.buckets = divide(like, device, mib)
        self.broken = False
        self._group = group
        self._prepare = prepare
        self._arrived = arrived
        self._comm_hook = comm_hook
        self._of_row = {row: (b, i) for b in self.buckets for i, row in enumerate(b.rows)}
        self.rows = sorted(self._of_row)
        self._launched: list[tuple[Bucket, Any]] = []
        used = device.type == "cuda" and len(like) > 0
        self._side = torch.cuda.Stream(device) if used else None  # type: ignore[no-untyped-call]
        self._writers: set[torch.cuda.Stream] = set()  # of gradients: a model may have branches on streams of their own

    def view(self, row: int) -> Tensor:
        """Where the gradient of a row lies, and its sum in the end."""
        bucket, i = self._of_row[row]
        return bucket.views[i]

    def ready(self, row: int) -> None:
        """The gradient of a row is in its `view`."""
        self._of_row[row][0].missing.discard(row)
        if self._side is not None:
            self._writers.add(torch.cuda.current_stream(self._side.device))
        while len(self._launched) < len(self.buckets) and not self.buckets[len(self._launched)].missing:
            self._launch(self.buckets[len(self._launched)])

    def wait(self) -> None:
        """Let the compute stream, and it alone, wait for all sums; buckets that are not complete are sent as well."""
        for bucket in self.buckets[len(self._launched) :]:
            self._launch(bucket)
        with self._on_side():
            for bucket, work in self._launched:
                if work is not None:
                    self._receive(bucket, work)
        self._launched = [(bucket, None) for bucket, _ in self._launched]
        if self._side is not None:
            current = torch.cuda.current_stream(self._side.device)
            current.wait_stream(self._side)
            for bucket in self.buckets:
                bucket.flat.record_stream(current)

    def _launch(self, bucket: Bucket) -> None:
        if self._side is not None:
            flat = bucket.flat
            for stream in self._writers | {torch.cuda.current_stream(self._side.device)}:
                self._side.wait_stream(stream)
                flat.record_stream(stream)
            flat.record_stream(self._side)
        with self._on_side():
            if self._prepare is not None:
                self._prepare(bucket)
            work: Any
            with self._noticing():
                if self._comm_hook is None:
                    work = dist.all_reduce(bucket.flat, group=self._group, async_op=True)
                else:
                    work = self._comm_hook(self._group, bucket)
            if self._side is not None:  # makes the side stream wait, not the host
                self._receive(bucket, work)
                work = None
        self._launched.append((bucket, work))

    def _receive(self, bucket: Bucket, work: Any) -> None:
        with self._noticing():
            average = work.wait()
        if self._comm_hook is not None and average.data_ptr() != bucket.flat.data_ptr():
            bucket.flat.copy_(average)
        if self._arrived is not None:
            self._arrived(bucket)

    @contextmanager
    def _on_side(self) -> Iterator[None]:
        with torch.cuda.stream(self._side) if self._side is not None else nullcontext():
            yield

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.broken = True
            raise
