"""All-reduce that starts while the backward pass is still running (paper, section 3.3 and Figure 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sama_kernels.distributed.buckets import Bucket, divide

Work = Callable[[Bucket], None]


class OverlappedReduction:
    """Sums gradients over the ranks of a group, bucket by bucket.

    A bucket's all-reduce is launched the moment its last gradient is there, on a stream of its own, beside the rest of
    the backward pass. Buckets are launched in one order on every rank, whatever order the gradients come in, because
    collectives have to match. At the end the compute stream waits for the events of the side stream, and the host for
    nothing (with gloo, whose collectives run on the host, it has to).

    Arguments:
        like: the tensors whose gradients are summed.
        prepare: last work on a complete bucket before it is sent, on the side stream.
        arrived: first work on the sum, likewise.
    """

    def __init__(
        self,
        like: Sequence[Tensor],
        group: Any,
        mib: float,
        *,
        prepare: Work | None = None,
        arrived: Work | None = None,
    ) -> None:
        self.buckets = divide(like, mib)
        self._group = group
        self._prepare = prepare
        self._arrived = arrived
        self._of_row = {row: (b, view) for b in self.buckets for row, view in zip(b.rows, b.views, strict=True)}
        self._launched: list[tuple[Bucket, Any]] = []
        device = like[0].device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def view(self, row: int) -> Tensor:
        """Where the gradient of a row lies, and its sum in the end."""
        return self._of_row[row][1]

    def views(self) -> list[Tensor]:
        """`view` of all rows, in order."""
        return [self._of_row[row][1] for row in range(len(self._of_row))]

    def ready(self, row: int) -> None:
        """The gradient of a row is in its `view`."""
        self._of_row[row][0].missing.discard(row)
        while len(self._launched) < len(self.buckets) and not self.buckets[len(self._launched)].missing:
            self._launch(self.buckets[len(self._launched)])

    def flush(self) -> None:
        """Nothing more comes: rows that are missing count as they are (zeros, unless written)."""
        for bucket in self.buckets[len(self._launched) :]:
            self._launch(bucket)

    def wait(self) -> None:
        """Let the compute stream, and it alone, wait for all sums."""
        self.flush()
        with self._on_side():
            for bucket, work in self._launched:
                if work is not None:
                    self._receive(bucket, work)
        self._launched = [(bucket, None) for bucket, _ in self._launched]
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)

    def _launch(self, bucket: Bucket) -> None:
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self._side.device))
            bucket.flat.record_stream(self._side)
        with self._on_side():
            if self._prepare is not None:
                self._prepare(bucket)
            work = dist.all_reduce(bucket.flat, group=self._group, async_op=True)
            if self._side is not None:  # makes the side stream wait, not the host
                self._receive(bucket, work)
                work = None
        self._launched.append((bucket, work))

    def _receive(self, bucket: Bucket, work: Any) -> None:
        work.wait()
        if self._arrived is not None:
            self._arrived(bucket)

    @contextmanager
    def _on_side(self) -> Iterator[None]:
        with torch.cuda.stream(self._side) if self._side is not None else nullcontext():
            yield
