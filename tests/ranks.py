"""Runs a function on several processes that form a gloo group."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks are forked from a process that has imported torch, and has started no threads: 0.2 s instead of 4 s.
multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "sama_kernels", "problems"])
TIMEOUT = timedelta(seconds=60)  # a rank that waits for ever is an error, not a hanging test


def _rank_main(
    rank: int,
    world: int,
    folder: str,
    port: int,
    backend: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"] = str(rank), str(world), str(rank)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, world, is_master=False, timeout=TIMEOUT)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    result = function(rank, world, *arguments)
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.barrier()
    # An ordinary end aborts now and then: gloo's threads may free tensors while the interpreter goes down (pytorch
    # #190489), and sharded modules keep their groups in torch's caches.
    sys.stdout.flush()
    os._exit(0)


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any, backend: str = "gloo") -> list[Any]:
    """`function(rank, world, *arguments)` on `world` processes; their results, by rank."""
    # The kind of store that torchrun makes. One in a file is asked again every 10 ms.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    with tempfile.TemporaryDirectory() as folder:
        given = world, folder, store.port, backend, function, arguments
        mp.start_processes(_rank_main, given, nprocs=world, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]
