"""The part of `bench.scaling` that runs on every rank: steps that take turns, what they send, hide and need."""

from __future__ import annotations

import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench import timing
from bench.collectives import Collectives, bytes_written, overlap
from bench.measure import synchronize
from bench.parallel_workload import ParallelWorkload, Size
from sama_experiments.common.memory import peak_bytes

Row = dict[str, Any]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What a group of ranks measures: each mode with each kind of lambda; `link_bytes`: and all-reduces of these."""

    size: Size
    modes: tuple[str, ...]
    lambdas: tuple[str, ...]
    rounds: int
    traces: int
    link_bytes: tuple[int, ...]


class RankClock:
    """Wall-clock time of a call that all ranks begin together."""

    def time(self, call: timing.Call) -> tuple[float, float]:
        dist.barrier()
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds = time.perf_counter() - start
        return seconds, seconds


def measure(rank: int, world: int, plan: Plan, device: torch.device, tell: Tell) -> list[Row]:
    """This rank's part of all records."""
    rows = [link(size, plan.rounds, device) for size in plan.link_bytes]
    for mode in plan.modes:
        for lam in plan.lambdas:
            tell(f"{mode}, {lam} lambda")
            rows += steps(ParallelWorkload(plan.size, mode, lam, rank, device), world, plan, device, mode, lam)
    return rows


def link(size: int, rounds: int, device: torch.device) -> Row:
    """Seconds of an all-reduce of `size` bytes, a call at a time."""
    values = torch.ones(size // 4, device=device)
    calls = {"all_reduce": (lambda: None, lambda: dist.all_reduce(values))}
    timing.interleaved(RankClock(), calls, 2, math.inf)
    times = timing.interleaved(RankClock(), calls, 4 * rounds, math.inf)
    return {"kind": "link", "bytes": 4 * len(values), "seconds": times["all_reduce"].work}


def steps(
    workload: ParallelWorkload, world: int, plan: Plan, device: torch.device, mode: str, lam: str
) -> Iterator[Row]:
    """A row per candidate: seconds of every round, bytes, seconds of collectives and hidden ones, memory.

    Under FSDP a base step comes before each, as in a training, and is not part of it: FSDP's backward prefetch is
    ordered by the forward passes since the last backward pass, and the first backward pass after those of a meta step
    at frozen theta gathers a layer too much (seen with torch 2.13).
    """
    candidates = workload.candidates(world)
    before = workload.plain_step if mode == "fsdp2" else lambda: None
    workload.weighted_step()  # `recorded` finds its values here
    workload.plain_step()
    sent = {key: counted(before, step, world) for key, step in candidates.items()}
    calls: dict[Any, Any] = {key: (before, step) for key, step in candidates.items()}
    times = timing.interleaved(RankClock(), calls, plan.rounds, math.inf)
    for key, step in candidates.items():
        traces = [overlap(before, step, device) for _ in range(plan.traces)]
        yield {
            "kind": "step", "mode": mode, "lambda": lam, "step": key[0], "sync": key[1], "seconds": times[key].work,
            **sent[key], "collective_s": [t[0] for t in traces], "hidden_s": [t[1] for t in traces],
            "peak_memory": min(peak_memory(workload, step, key[0], device) for _ in range(plan.traces)),
            **workload.elements(),
        }  # fmt: skip


def counted(before: Callable[[], object], step: Callable[[], object], world: int) -> Row:
    """What a step sends, the second time that it is made: at the first the ranks agree on shapes."""
    backend = dist.get_backend()
    before()
    step()
    before()
    dist.barrier()
    earlier = bytes_written()
    with Collectives(world, backend) as collectives:
        step()
    now = bytes_written()
    dist.barrier()
    return {
        "collectives": len(collectives.issued), "payload_bytes": collectives.payload,
        "bytes_on_wire": collectives.on_wire,
        "bytes_written": now - earlier if now is not None and earlier is not None and backend == "gloo" else None,
    }  # fmt: skip


def peak_memory(workload: ParallelWorkload, step: Callable[[], object], kind: str, device: torch.device) -> int:
    """Live bytes of this rank at the peak of a step; a meta step finds the gradients of a base step, which makes them.

    The buckets that DistributedDataParallel keeps for gradients are counted in both. gloo's threads let go of gathered
    layers late now and then, or unseen by the profiler, so that the least of several calls is what comes out again.
    """
    workload.plain_step()
    resident = workload.resident_bytes()
    if kind == "base" and not isinstance(workload.net, torch.nn.parallel.DistributedDataParallel):
        workload.optimizer.zero_grad()
        resident = workload.resident_bytes()
    return resident + peak_bytes(step, device)[0]


def rank_main(rank: int, world: int, threads: int, plan: Plan, folder: str, told: Any) -> None:
    """A process of the group: measures, and leaves its rows in `folder`."""
    torch.set_num_threads(threads)
    # FSDP calls collectives by names that newer versions of torch deprecate.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world,
        timeout=timedelta(minutes=3), device_id=device if on_gpu else None,
    )  # fmt: skip
    rows = measure(rank, world, plan, device, told.put if rank == 0 else lambda text: None)
    torch.save(rows, Path(folder) / f"{rank}.pt")
    dist.barrier()
    # An ordinary end aborts now and then, 2 of 10 times on a busy machine: gloo's threads may free tensors while the
    # interpreter goes down (pytorch #190489), and sharded modules keep their groups in torch's caches.
    os._exit(0)


def run(world: int, threads: int, plan: Plan, tell: Tell) -> list[list[Row]]:
    """The rows of every rank, measured by `world` processes with `threads` threads each."""
    # Ranks are forked from a process that has imported everything; but CUDA cannot be forked once it is asked for.
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    if method == "forkserver":
        mp.get_context(method).set_forkserver_preload(["bench.scaling_ranks", "transformers.models.bert.modeling_bert"])
    told = mp.get_context(method).SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.start_processes(
            rank_main, (world, threads, plan, folder, told), nprocs=world, join=False, start_method=method
        )
        while not ranks.join(timeout=0.2):
            while not told.empty():
                tell(told.get())
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]
