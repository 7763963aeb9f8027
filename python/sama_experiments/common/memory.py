"""Peak memory of a piece of work, in a way that compares methods fairly on a CPU as well as on a GPU."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

CPU_MEASURE = "most bytes that torch's CPU allocator had given out at one time, from its profiler"
CUDA_MEASURE = "torch.cuda.max_memory_allocated, less what was allocated before"


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """The profiler writes lines about itself to the process's stderr, whatever its log level."""
    sys.stderr.flush()
    saved = os.dup(2)
    silent = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(silent, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(silent)


def peak_bytes(work: Callable[[], object], device: torch.device) -> tuple[int, str]:
    """Run ``work``; return the most bytes it held at one time beyond what was there before, and how that was measured.

    The process's resident memory would not do: the allocator keeps freed pages, so it shows the largest run so far.
    What ``work`` frees of earlier allocations is not subtracted on the CPU.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, CUDA_MEASURE
    gc.collect()  # else what an earlier call left in reference cycles is freed, and subtracted, in this one
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with quiet_stderr(), profile:
        work()
    records: Any = profile.profiler and profile.profiler.kineto_results
    events = [e for e in records.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, CPU_MEASURE
