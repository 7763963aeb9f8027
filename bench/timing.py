"""Seconds of calls that take turns, each of them with cold caches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

Call = Callable[[], object]


@dataclass
class Times:
    """Seconds of every round: of the work, and until the call returned (the same on the CPU)."""

    work: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)


def spread(seconds: list[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    if len(seconds) < 2:
        return seconds[0], seconds[0], seconds[0]
    low, *_, high = statistics.quantiles(seconds, n=10, method="inclusive")
    return statistics.median(seconds), low, high


class CpuClock:
    """Wall-clock time. Before every call a buffer larger than the last-level cache is read, by all threads."""

    def __init__(self, flush_bytes: int | None = None) -> None:
        self.flush = torch.ones((flush_bytes or int(1.1 * last_level_cache_bytes())) // 4)

    def time(self, call: Call) -> tuple[float, float]:
        self.flush.sum()
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        return seconds, seconds


class CudaClock:
    """Time between two events on the current stream, and the time in which the host has launched the call.

    Before every call a buffer of several times the L2 cache is read, which leaves nothing there for the call to write
    back. Then the GPU is kept busy for about a millisecond, as it is by the passes of a real meta step: a call that is
    launched meanwhile shows the time of its kernels; one with more launches than that shows what they cost beyond it.
    """

    HEAD_START_CYCLES = 2_000_000

    def __init__(self, device: torch.device, flush_bytes: int | None = None) -> None:
        l2_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.ones((flush_bytes or 4 * l2_bytes) // 4, device=device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, call: Call) -> tuple[float, float]:
        self.flush.sum()
        torch.cuda.synchronize()
        torch.cuda._sleep(self.HEAD_START_CYCLES)
        self.start.record()
        begin = time.perf_counter()
        call()
        host = time.perf_counter() - begin
        self.end.record()
        torch.cuda.synchronize()
        return self.start.elapsed_time(self.end) / 1e3, host


Clock = CpuClock | CudaClock


def interleaved(
    clock: Clock, calls: dict[str, tuple[Call, Call]], rounds: int, seconds: float, at_least: int = 5
) -> dict[str, Times]:
    """Time `calls`, name -> (what to do before, the call), one after the other in every round.

    So a slow spell of the machine hits all of them. Nothing is warmed up here: call everything once before.

    Arguments:
        rounds: how many, if the time allows.
        seconds: no round is begun after this much time, once there are `at_least`. A call that takes more than a fifth
            of it takes part in the first three rounds only, one that takes more than all of it in the first.
    """
    times = {name: Times() for name in calls}
    end = time.perf_counter() + seconds
    for number in range(rounds):
        if number >= at_least and time.perf_counter() > end:
            break
        for name, (before, call) in calls.items():
            if number >= 1 and min(times[name].work) > (seconds / 5 if number >= 3 else seconds):
                continue
            before()
            work, host = clock.time(call)
            times[name].work.append(work)
            times[name].host.append(host)
    return times


def last_level_cache_bytes() -> int:
    """The largest cache of the first core; 64 MiB if the system does not say."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1] in units), default=64 << 20)
