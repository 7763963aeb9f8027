"""Which collectives a stand-in makes: of every kind, wherever they are made, and which it cannot make."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel import Divided, bits_of
from problems import same_bits
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor, all_reduce

from sama_kernels.distributed import standing_in
from sama_kernels.distributed.collectives import Record, alike
from sama_kernels.distributed.meeting import Failed


class Broken(Exception):
    """What the faulty closure raises."""


def _many(rank: int, world: int) -> None:
    """Collectives of every kind that all members of a group make alike."""
    x, whole, parts = torch.full((3,), rank + 1.0), torch.empty(3 * world), [torch.empty(3) for _ in range(world)]
    dist.all_reduce(x, op=dist.ReduceOp.MAX)
    dist.broadcast(x, src=world - 1)
    dist.reduce(x, dst=0)
    dist.all_gather(parts, x)
    dist.all_gather_into_tensor(whole, x)
    dist.reduce_scatter_tensor(x, whole)
    dist.reduce_scatter(x, [*torch.ones(world, 3)])
    dist.all_to_all_single(whole, torch.ones_like(whole))
    dist.barrier()
    works = [dist.all_reduce(y, async_op=True) for y in (torch.ones(2, dtype=torch.int64), torch.ones(5).bfloat16())]
    for work in works:
        work.wait()
    dist.all_reduce_coalesced([torch.ones(2), torch.ones(4)])  # type: ignore[no-untyped-call]
    all_gather_tensor(all_reduce(torch.ones(2), "sum", dist.group.WORLD), 0, dist.group.WORLD).sum().item()
    everything: list[Any] = [None] * world
    dist.all_gather_object(everything, {"rank": rank})


def _every_kind(rank: int, world: int, bad: int) -> list[str]:
    """The failed rank is at its first collective of the closure when the others have all of them before them."""
    standing_in.LOOK = 0.02
    problem = Divided(rank, world)
    optimizer = problem.optimizer(2)
    problem.train(optimizer)
    original = problem.meta_loss
    said = []
    for broken in (False, True, False):
        before = bits_of([*problem.net.parameters()])

        def meta_loss(broken: bool = broken) -> Tensor:
            if broken and rank == bad:
                raise Broken("on purpose")
            _many(rank, world)
            return original()

        problem.meta_loss = meta_loss  # type: ignore[method-assign]
        try:
            problem.meta_grad(optimizer, sync="full")
            said.append("")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error} {getattr(error, '__notes__', '')} {error.__cause__!r}")
        assert all(map(same_bits, before, problem.net.parameters()))
    return said


@pytest.mark.parametrize(("world", "bad"), [(2, 0), (3, 2), (4, 1)])
def test_collectives_of_every_kind(world: int, bad: int) -> None:
    """What the others get is zeros: a pickled object that is none raises there, which is not that rank's failure."""
    for rank, said in enumerate(run_ranks(world, _every_kind, bad)):
        assert said[0] == said[2] == ""
        if rank == bad:
            assert said[1] == "Broken: on purpose  None"
        else:
            assert said[1].startswith(f"Failed: base_loss, meta_loss: the meta step failed on rank {bad}, whose own")
            assert "UnpicklingError" in said[1] or "EOFError" in said[1]


def _synchronised(rank: int, world: int, bad: int) -> list[Tensor]:
    """Batch norm over all ranks, whose forward and backward passes are collectives; within DistributedDataParallel."""
    standing_in.LOOK = 0.02
    found = []
    for when in (None, "forward", "backward"):
        problem = Divided(rank, world, dtype=torch.float32)
        norm = nn.BatchNorm1d(8)
        problem.net.insert(2, norm)
        problem.net = nn.parallel.DistributedDataParallel(problem.net)
        layer = problem.net.module[1]
        optimizer = problem.optimizer(2)
        problem.train(optimizer)
        original = norm.forward

        def forward(x: Tensor, original: Callable[[Tensor], Tensor] = original) -> Tensor:
            share = x.sum(0) / all_reduce(torch.ones(8), "sum", dist.group.WORLD)  # a collective of the closure's
            return original(x) + 0 * share.mean()

        norm.forward = forward  # type: ignore[method-assign]

        def fail(*_: Any) -> None:
            raise Broken("on purpose")

        def fail_in_backward(module: nn.Module, inputs: Any, output: Tensor) -> None:
            output.register_hook(fail)

        if when is not None:
            hook = fail if when == "forward" else fail_in_backward
            handle = layer.register_forward_hook(hook) if rank == bad else None
            buffers = bits_of([*norm.buffers()])
            with pytest.raises(Broken if rank == bad else Failed):
                problem.meta_grad(optimizer, sync="full")
            assert all(map(same_bits, buffers, norm.buffers()))
            if handle is not None:
                handle.remove()
        out = problem.meta_grad(optimizer, sync="full")
        found.append(torch.cat([g.flatten() for g in out.grads]))
    return found


def test_collectives_within_the_layers_of_a_replicated_model() -> None:
    for never, *others in run_ranks(2, _synchronised, 1):
        assert never.any() and all(torch.equal(never, x) for x in others)


def _recorded(rank: int, world: int) -> list[list[str]]:
    record = Record()
    with record.open():
        dist.all_reduce(torch.ones(2))
        with torch.inference_mode():
            dist.barrier()
        thread = threading.Thread(target=lambda: dist.all_reduce(torch.ones(2), group=other))
        other = dist.new_group()
        made = len(record.calls)
        thread.start()
        thread.join()
    dist.all_reduce(torch.ones(2))
    return [[c.name for c in record.calls[:2]], [c.name for c in record.calls[made:]]]


def test_what_is_recorded() -> None:
    """While the record is open, and not what threads of the program's do meanwhile."""
    for rows in run_ranks(2, _recorded):
        assert rows == [["allreduce_", "barrier"], []]


def test_which_calls_are_alike() -> None:
    small, large = ({"shape": (n,), "dtype": "float32", "device": "cpu"} for n in (2, 3))
    assert alike("allgather_", [[[small, small]], [small], None])
    assert not alike("allgather_", [[[small, large]], [small], None])
    assert alike("alltoall_base_", [large, large, None, [], []])
    assert alike("alltoall_base_", [large, large, None, [1, 1, 1], [1, 1, 1]])
    assert not alike("alltoall_base_", [large, large, None, [1, 2], [2, 1]])
    assert not alike("send", [[small], None, 1, 0])
