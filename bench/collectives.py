"""What a step sends: its collectives, the bytes of each, and how much of their time is hidden behind computation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure import synchronize
from sama_experiments.common.memory import quiet_stderr

# Which argument of a collective of torch's c10d is the whole (what one rank has after a gather or before a scatter),
# and how often (p - 1) / p of it is sent by each of p ranks in a ring.
WHOLE = {"allreduce_": (0, 2), "_allgather_base_": (0, 1), "_reduce_scatter_base_": (1, 1), "broadcast_": (0, 1)}
# gloo has no reduce-scatter of its own: it is an all-reduce of the whole. That and the ring are what the kernel counts
# (tests/test_bench_scaling.py), but for 48 bytes per message.
GLOO_WHOLE = {**WHOLE, "_reduce_scatter_base_": (1, 2)}
COUNTED = "bytes of the tensors given to collectives (payload); the ring formula for what a rank sends of it (wire)"
METHOD = {
    "cpu": "profiler trace: share of the time of the gloo:* events, on gloo's threads, in which the main thread is in"
    " an aten or sama op; what it does between ops counts as waiting, so that this is a lower bound",
    "cuda": "profiler trace: share of the time of the nccl kernels in which another kernel runs on the GPU",
}
COMPUTING = ("aten::", "sama::")  # autograd's own events and those of FSDP enclose hooks that wait for collectives
STEP = "bench: step"
Intervals = list[tuple[int, int]]


class Collectives(TorchDispatchMode):
    """Notes every collective that this rank issues in the block, those of DDP's reducer and of FSDP included.

    Attributes:
        issued: its name in c10d, the bytes of the whole, the bytes that a rank sends of it by the ring formula.
    """

    def __init__(self, world: int, backend: str) -> None:
        super().__init__()
        self.issued: list[tuple[str, int, float]] = []
        self._world, self._whole = world, GLOO_WHOLE if backend == "gloo" else WHOLE

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::")
            argument, times = self._whole[name]
            size = nbytes(args[argument])
            self.issued.append((name, size, times * (self._world - 1) / self._world * size))
        return function(*args, **(kwargs or {}))

    @property
    def payload(self) -> int:
        """Bytes given to collectives."""
        return sum(size for _, size, _ in self.issued)

    @property
    def on_wire(self) -> float:
        """Bytes that this rank sends, by the ring formula; of a broadcast: on average over the ranks."""
        return sum(sent for _, _, sent in self.issued)


def nbytes(tensors: Tensor | Iterable[Tensor]) -> int:
    """Of one tensor, or of all in a list."""
    each = [tensors] if isinstance(tensors, Tensor) else tensors
    return sum(t.numel() * t.element_size() for t in each)


def bytes_written() -> int | None:
    """Bytes that this process has passed to write calls so far, files and sockets; None where the kernel does not say.

    gloo sends by such calls, so that their difference is what a step has really sent, headers of gloo included.
    """
    counters = Path("/proc/self/io")
    if not counters.exists():
        return None
    return next(int(line.split()[1]) for line in counters.read_text().splitlines() if line.startswith("wchar"))


def overlap(before: Callable[[], object], work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Run `work` under the profiler: seconds in which a collective of this rank runs, and of them hidden ones (METHOD).

    `before` runs first, and does not count. What several collectives take at the same time counts once.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profile = torch.profiler.profile(activities=activities)
    before()
    with quiet_stderr(), profile:
        dist.barrier()  # else the ranks' collectives would wait for the slowest profiler
        synchronize()
        with torch.profiler.record_function(STEP):
            work()
            synchronize()
    records: Any = profile.profiler and profile.profiler.kineto_results
    events = list(records.events())
    step = [span(event) for event in events if event.name() == STEP and event.device_type() == DeviceType.CPU]
    running, computing = (on_gpu if device.type == "cuda" else on_cpu)(events)
    running = common(running, step)
    return seconds(running), seconds(common(running, computing))


def on_cpu(events: list[Any]) -> tuple[Intervals, Intervals]:
    """When gloo's threads run collectives, and when the main thread computes."""
    main = next(e.start_thread_id() for e in events if e.name() == STEP)
    computing = [e for e in events if e.start_thread_id() == main and e.name().startswith(COMPUTING)]
    collective = [e for e in events if e.name().startswith("gloo:")]
    return union(map(span, collective)), union(map(span, computing))


def on_gpu(events: list[Any]) -> tuple[Intervals, Intervals]:
    """When kernels of nccl run, and when others do."""
    kernels = [e for e in events if e.device_type() == DeviceType.CUDA and not e.is_user_annotation()]
    collective = [e for e in kernels if "nccl" in e.name()]
    others = [e for e in kernels if "nccl" not in e.name()]
    return union(map(span, collective)), union(map(span, others))


def span(event: Any) -> tuple[int, int]:
    """Beginning and end, in nanoseconds."""
    return event.start_ns(), event.start_ns() + event.duration_ns()


def union(intervals: Iterable[tuple[int, int]]) -> Intervals:
    """In order, without overlaps."""
    merged: Intervals = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def common(first: Intervals, second: Intervals) -> Intervals:
    """What is in both; each of them in order, without overlaps."""
    found: Intervals = []
    i = j = 0
    while i < len(first) and j < len(second):
        begin, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if begin < end:
            found.append((begin, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return found


def seconds(intervals: Intervals) -> float:
    return sum(end - begin for begin, end in intervals) / 1e9
