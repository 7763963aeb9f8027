"""CUDA streams on paper: what runs on which stream and waits for what is noted, and unordered accesses are errors.

Everything really runs at once, on the CPU. torch's own detector of races between streams (torch.cuda._sanitizer)
follows who waits for whom; here tensors are ranges of memory, so that parts of a view count as parts of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.cuda._sanitizer import EventHandler, zip_arguments
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sama_kernels.distributed import reduction


class Race(AssertionError):
    """Nothing says which of two operators on the same memory comes first."""


class Stream:
    """In place of `torch.cuda.Stream`."""

    device = torch.device("cpu")

    def __init__(self, streams: Streams, number: int) -> None:
        self._streams, self.number = streams, number

    def wait_stream(self, other: Stream) -> None:
        self._streams.wait(self, other)


class Streams(TorchDispatchMode):
    """Watches every operator; `created`: the streams, of which the first is the one that is current at the start.

    skipped: pairs (who waits, for whom), by number, that are left out, to see that the detector finds it.
    """

    def __init__(self, skipped: set[tuple[int, int]] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._handler = EventHandler()
        self._events = count()
        self._skipped = skipped or set()
        self._kept: list[Any] = []  # no memory is used twice
        self.created: list[Stream] = []
        self.recorded: list[tuple[int, int]] = []  # (address, stream) of `record_stream`
        self.current = self.new()

    def new(self) -> Stream:
        """Another stream."""
        stream = Stream(self, len(self.created))
        self._handler._handle_stream_creation(stream.number)
        self.created.append(stream)
        return stream

    def wait(self, stream: Stream, other: Stream) -> None:
        """What `stream` does from now on happens after what `other` has been given so far."""
        if (stream.number, other.number) not in self._skipped:
            event = next(self._events)
            self._handler._handle_event_creation(event)
            self._handler._handle_event_record(event, other.number)
            self._handler._handle_event_wait(event, stream.number)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """In place of `torch.cuda.stream`."""
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        reads: set[int] = set()
        writes: set[int] = set()
        for argument, value in zip_arguments(func._schema, args, kwargs):
            alias = argument.alias_info
            if alias is None or alias.is_write:  # else a view is taken, which reads nothing
                (reads if alias is None else writes).update(self._memory(value))
        result = func(*args, **kwargs)
        for returned, value in zip(func._schema.returns, (result,), strict=False):
            if returned.alias_info is None and "empty" not in func.__name__:  # which no kernel fills
                writes.update(self._memory(value))
        names = {address: [str(func)] for address in reads | writes}
        errors = self._handler._handle_kernel_launch(
            self.current.number, reads - writes, writes, set(), str(func), names
        )
        for error in errors:
            earlier = error.previous_access
            raise Race(
                f"{func} on stream {self.current.number}, {earlier.operator} on stream {earlier.stream} before it"
            )
        return result

    def _memory(self, value: Any) -> set[int]:
        tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor) and x.device.type == "cpu" and x.numel()]
        tensors = [x for x in tensors if not x._is_zerotensor()]  # a tangent that needs no memory
        self._kept += [x.untyped_storage() for x in tensors]
        return {address for x in tensors for address in addresses(x)}


def addresses(x: Tensor) -> range:
    """Of the pieces of 8 bytes between the first element and the last one."""
    last = sum((size - 1) * abs(stride) for size, stride in zip(x.shape, x.stride(), strict=True))
    return range(x.data_ptr() // 8, (x.data_ptr() + (last + 1) * x.element_size() - 1) // 8 + 1)


class Collective:
    """In place of `torch.distributed.all_reduce`: works on a stream of its own, as NCCL does; a rank that is alone."""

    def __init__(self, streams: Streams) -> None:
        self._streams, self._own = streams, streams.new()

    def __call__(self, flat: Tensor, group: Any, async_op: bool = False) -> Collective:
        self._streams.wait(self._own, self._streams.current)
        with self._streams.on(self._own):
            flat.mul_(1)
        if not async_op:
            self.wait()
        return self

    def wait(self) -> None:
        """The current stream waits, the host does not."""
        self._streams.wait(self._streams.current, self._own)


@contextmanager
def watched(skipped: set[tuple[int, int]] | None = None) -> Iterator[Streams]:
    """Within the block `reduction` works as on a GPU: compute is stream 0, the collective's 1, its own 2 and higher."""
    streams = Streams(skipped)
    ordinary = reduction.OverlappedReduction.__init__

    def on_a_side_stream(self: Any, *args: Any, **kwargs: Any) -> None:
        ordinary(self, *args, **kwargs)
        self._side = streams.new() if self.buckets else None

    def record_stream(tensor: Tensor, stream: Stream) -> None:
        streams.recorded.append((tensor.data_ptr(), stream.number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduction.OverlappedReduction, "__init__", on_a_side_stream)
        patch.setattr(reduction.dist, "all_reduce", Collective(streams))
        patch.setattr(torch.cuda, "current_stream", lambda device=None: streams.current)
        patch.setattr(torch.cuda, "stream", streams.on)
        patch.setattr(torch.Tensor, "record_stream", record_stream)
        with streams:
            yield streams
