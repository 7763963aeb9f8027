"""The processes that torchrun or accelerate launch started for one run of a program; without a launcher there is one.

Every batch is divided over them, so that the run is the same experiment whatever their number.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # has to come before a group is there, which it would hold for ever: see leave
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from .errors import ExperimentError

T = TypeVar("T")

WAIT_FOR_OTHER_ERRORS = timedelta(seconds=5)


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 speaks and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def joined() -> Iterator[Callable[[str], None]]:
    """Join the processes that a launcher's environment variables announce, for the length of the block.

    Yields a function that prints an error which all processes run into, once. After any other exception the group is
    left as it is: to take it down could mean to wait for collectives that never come.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield lambda message: print(message, file=sys.stderr)
        return
    store, number, count = next(iter(rendezvous("env://")))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count)

    def report(message: str) -> None:
        failed = store.add("errors", 1)
        if failed == 1:
            print(message, file=sys.stderr, flush=True)
        # A launcher ends all processes as soon as one has failed; those with the same error are to end by themselves.
        if failed == count:
            store.set("all have failed", "")
        else:
            with suppress(RuntimeError):  # too late, or the store ended with the process that holds it
                store.wait(["all have failed"], WAIT_FOR_OTHER_ERRORS)

    try:
        yield report
    except SystemExit:  # of argparse, on all
        leave()
        raise
    leave()


def leave() -> None:
    """End the group, and wait for the end of gloo's threads.

    One that still has a tensor to free while the interpreter goes down would abort the process, although all work is
    done (pytorch #190489). They end with the last reference to the group, and modules that are wrapped are in cycles.
    """
    dist.destroy_process_group()
    gc.collect()


@contextmanager
def first_speaks() -> Iterator[None]:
    """What is printed within the block, by all processes alike, is printed by the first one only."""
    if rank() == 0:
        yield
        return
    with open(os.devnull, "w") as silence, redirect_stdout(silence), redirect_stderr(silence):
        yield


def gpu() -> torch.device:
    """The GPU of this process."""
    if world() == 1:
        return torch.device("cuda")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", world())), torch.cuda.device_count()
    if here > gpus:
        raise ExperimentError(
            f"{here} processes here, but PyTorch sees {gpus} GPU(s): start {gpus}, or use --device cpu"
        )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ExperimentError("--device cuda: PyTorch sees no GPU here")
    return gpu() if name != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def own_random_numbers(seed: int) -> None:
    """From here on the global generators (dropout's) draw something else on every process; the first one's go on."""
    if rank() > 0:
        torch.manual_seed(seed + rank())


def is_mine(place: int) -> bool:
    """Whether this process does the work number ``place`` of a list that all have."""
    return place % world() == rank()


def my_part(batch: Tensor) -> tuple[Tensor, float]:
    """The rows of a batch (int64 [B], B >= the number of processes) that are this process's, and what they count for.

    The latter is a factor of the mean loss over the part. The mean over the processes, which is what
    DistributedDataParallel makes of gradients, is then that of the mean loss over the batch, also where the parts are
    not of one size. Every n-th row is taken, because batches may be sorted by length.
    """
    part = batch[rank() :: world()]
    return part, world() * len(part) / len(batch)


def averaging(model: nn.Module) -> nn.Module:
    """``model`` with gradients averaged over the processes in each backward pass; itself where there is one process."""
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if world() > 1 else model


def sum_in_place(values: Tensor) -> None:
    """Sum over the processes."""
    if world() > 1:
        dist.all_reduce(values)


def total(number: int) -> int:
    """The sum over the processes."""
    return _reduced(number, dist.ReduceOp.SUM)


def largest(number: int) -> int:
    """The maximum over the processes."""
    return _reduced(number, dist.ReduceOp.MAX)


def _reduced(number: int, operation: dist.ReduceOp.RedOpType) -> int:
    if world() == 1:
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, operation)
    return int(value)


def gathered(own: T) -> list[T]:
    """What every process gives, in their order."""
    if world() == 1:
        return [own]
    found: list[T | None] = [None] * world()
    dist.all_gather_object(found, own)
    return cast(list[T], found)
