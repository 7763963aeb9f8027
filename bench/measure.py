"""What the benchmarks share: interleaved timing, peak memory, and the facts about the machine that go into the JSON."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from sama_experiments import report


def interleaved(work: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every candidate, `rounds` times each, one after the other within a round.

    Interleaving lets a slow moment of the machine hit all candidates alike; ratios are taken within a round.
    """
    for _ in range(warmup):
        for function in work.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, function in work.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "q25": low, "q75": high}


def paired_ratio(values: list[float], reference: list[float]) -> dict[str, float]:
    """Spread of the ratios taken round by round."""
    return spread([a / b for a, b in zip(values, reference, strict=True)])


def machine() -> dict[str, Any]:
    """Where a figure was measured, and with what: the program's own facts, and those that only benchmarks need."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return {
        **report.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "load": os.getloadavg()[0],
        "allocator": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_") or k == "LD_PRELOAD"},
        "versions": report.versions(),
        "commit": commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else ""),
    }
