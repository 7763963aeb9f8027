"""What the benchmarks share: interleaved timing, peak memory, and the facts about the machine that go into the JSON."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from sama_experiments.common import records

BUSY = 0.5  # load per CPU


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
    """Median and quartiles; of a single value all three are that value."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": median, "q25": low, "q75": high}


def paired_ratio(values: list[float], reference: list[float]) -> dict[str, float]:
    """Spread of the ratios taken round by round."""
    return spread([a / b for a, b in zip(values, reference, strict=True)])


def machine() -> dict[str, Any]:
    """Where a figure was measured, and with what: the program's own facts, and those that only benchmarks need."""
    return {
        **records.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "load": os.getloadavg()[0],
        "allocator": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_") or k == "LD_PRELOAD"},
        "versions": {**records.versions(), "triton": installed("triton"), "cuda": torch.version.cuda},
        **(gpu() if torch.cuda.is_available() else {}),
        "commit": commit(),
    }


def disturbed(about: dict[str, Any]) -> bool:
    """Whether other programs kept the CPUs busy before the run; `about`: `machine()` of then."""
    return bool(about["load"] > BUSY * about["cpus"])


def gpu() -> dict[str, Any]:
    """What tells GPUs of the same name apart."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or None,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_cache_bytes": properties.L2_cache_size,
    }


def commit() -> str:
    """Of the working tree; $COMMIT if set: a copy on another machine may have no git, or another HEAD."""
    head = output_of("git", "rev-parse", "--short", "HEAD")
    changed = output_of("git", "status", "--porcelain", "-uno")
    return os.environ.get("COMMIT") or (head + ("+changes" if changed else "") if head else "unknown")


def installed(package: str) -> str | None:
    """The version of a package; None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def output_of(*command: str) -> str:
    """What a command prints; empty if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
