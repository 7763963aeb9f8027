"""A rank that failed makes the collectives that others make: of every kind, with what they are told afterwards."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel import Divided, bits_of
from problems import same_bits
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor, all_reduce

import sama_kernels as sk
from sama_kernels.distributed import exchange, standing_in
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


def _several(rank: int, world: int, faulty: list[int]) -> str:
    """Ranks that fail one after the other: in pass 1, 2, 3."""
    standing_in.LOOK = 0.02
    problem = Divided(rank, world)
    problem.of_losses = False
    optimizer = problem.optimizer(2)
    problem.train(optimizer)
    original, calls = problem.base_loss, 0

    def closure(loss: Callable[[], Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if rank in faulty and calls == 1 + faulty.index(rank):
            raise Broken(f"on rank {rank}")
        dist.all_reduce(torch.ones(3))
        return loss()

    meta_loss = problem.meta_loss
    problem.base_loss = lambda: closure(original)  # type: ignore[method-assign]
    problem.meta_loss = lambda: closure(meta_loss)  # type: ignore[method-assign]
    with pytest.raises((Broken, RuntimeError)) as failure:
        problem.meta_grad(optimizer)
    said = f"{failure.type.__name__}: {failure.value} {failure.value.__cause__!r}"
    calls = 10
    assert not problem.meta_grad(optimizer).degenerate
    return said


@pytest.mark.parametrize("faulty", [[1, 0], [2, 1, 0]])
def test_only_the_first_failure_counts(faulty: list[int]) -> None:
    """The later ones are those of ranks that have computed with a stand-in's zeros."""
    for rank, said in enumerate(run_ranks(4, _several, faulty)):
        if rank == faulty[0]:
            assert said == f"Broken: on rank {rank} None"
        else:
            assert said.startswith(f"Failed: base_loss, meta_loss: the meta step failed on rank {faulty[0]}, whose own")
            assert said.endswith(f"Broken('on rank {rank}')" if rank in faulty else "None")


def _alike(rank: int, world: int, apart: bool) -> str:
    problem = Divided(rank, world)
    optimizer = problem.optimizer(2)
    problem.train(optimizer)
    original = problem.meta_loss

    def meta_loss() -> Tensor:
        if not apart or rank < 2:
            raise Broken(f"on rank {rank}")
        return original()

    problem.meta_loss = meta_loss  # type: ignore[method-assign]
    with pytest.raises((Broken, RuntimeError)) as failure:
        problem.meta_grad(optimizer)
    problem.meta_loss = original  # type: ignore[method-assign]
    assert not problem.meta_grad(optimizer).degenerate
    return f"{failure.type.__name__}: {failure.value}"


@pytest.mark.parametrize("apart", [False, True])
def test_ranks_that_fail_at_the_same_point_say_their_own(apart: bool) -> None:
    first, second, third = run_ranks(3, _alike, apart)
    assert (first, second) == ("Broken: on rank 0", "Broken: on rank 1")
    told = "Failed: base_loss, meta_loss: the meta step failed on rank 0, 1, whose own error says why"
    assert third.startswith(told) if apart else third == "Broken: on rank 2"


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


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist
from parallel import Divided
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
problem = Divided(rank, world)
optimizer = problem.optimizer(2)
problem.train(optimizer, 1)
original = problem.meta_loss
def meta_loss():
    if rank == 1:
        raise ValueError("on purpose")
    dist.gather(torch.ones(2), [torch.empty(2) for _ in range(world)] if rank == 0 else None)
    return original()
problem.meta_loss = meta_loss
problem.meta_grad(optimizer)
"""


def test_where_it_cannot_stand_in_torchrun_ends_the_job(tmp_path: Path) -> None:
    """Of a gather, what a member passes depends on which one it is; the other rank waits until torchrun ends it."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "ValueError: on purpose" in done.stderr
    assert (
        "other ranks may wait for this one in a collective (gather is not the same call on every rank)" in done.stderr
    )


def _silent(rank: int, world: int) -> str:
    """One rank leaves the meta step without a word, as with Ctrl-C; the other one fails."""
    standing_in.LOOK, standing_in.SILENCE = 0.02, 1.0
    problem = Divided(rank, world)
    optimizer = problem.optimizer(2)
    problem.train(optimizer)

    def meta_loss() -> Tensor:
        raise KeyboardInterrupt if rank == 0 else Broken("on purpose")

    problem.meta_loss = meta_loss  # type: ignore[method-assign]
    with pytest.raises((Broken, KeyboardInterrupt)) as failure:
        problem.meta_grad(optimizer)
    return f"{failure.type.__name__} {getattr(failure.value, '__notes__', '')}"


def test_a_rank_that_is_silent_is_not_waited_for_for_ever() -> None:
    left, failed = run_ranks(2, _silent)
    assert left == "KeyboardInterrupt "
    assert failed.startswith("Broken ['sama_kernels: other ranks may wait") and "rank 0 has been silent" in failed


def _where_hosts_meet(rank: int, world: int, sync: str) -> list[str]:
    """As on an accelerator, where reading the status would make the host wait: it is not read."""
    standing_in.LOOK = 0.02
    exchange.may_wait = lambda device: False
    said = []
    for closure in ("meta_loss", "base_loss"):
        problem = Divided(rank, world)
        optimizer = problem.optimizer(2)
        problem.train(optimizer)
        original = getattr(problem, closure)

        def broken() -> Tensor:
            raise Broken("on purpose")

        for step in range(4):
            before = bits_of([*problem.net.parameters()])
            setattr(problem, closure, broken if rank == 1 and step in (1, 2) else original)
            try:
                problem.meta_grad(optimizer, sync=sync)
                said.append("done")
            except (Broken, Failed) as error:
                said.append(f"{type(error).__name__}: {error}"[:72])
            assert all(map(same_bits, before, problem.net.parameters()))
    return said


@pytest.mark.parametrize(("world", "sync"), [(2, "full"), (3, "final")])
def test_where_the_host_may_not_wait_for_the_device(world: int, sync: str) -> None:
    for rank, said in enumerate(run_ranks(world, _where_hosts_meet, sync)):
        told = "Failed: base_loss, meta_loss: the meta step failed on rank 1, whose own "
        failed = "Broken: on purpose" if rank == 1 else told
        assert said == ["done", failed, failed, "done"] * 2


def _out_of_memory(rank: int, world: int) -> str:
    """What the failed closure held is gone when zeros are made in its place."""
    standing_in.LOOK = 0.02
    problem = Divided(rank, world)
    optimizer = problem.optimizer(2)
    problem.train(optimizer)
    kept: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    made = standing_in.call

    def call(*arguments: Any) -> Any:
        alive.append(kept[0]() is not None)
        return made(*arguments)

    def meta_loss() -> Tensor:
        activations = torch.ones(1000)
        kept.append(weakref.ref(activations))
        if rank == 1:
            raise torch.OutOfMemoryError("on purpose")
        return problem.net(problem.meta[0]).mean()

    standing_in.call = call
    with pytest.raises(RuntimeError) as failure:
        sk.meta_grad(
            problem.base_loss, meta_loss, base_params=problem.net, meta_params=problem.weigher, optimizer=optimizer,
            sync="full",
        )  # fmt: skip
    return f"{failure.type.__name__} {alive}"


def test_a_rank_that_is_out_of_memory_lets_go_first() -> None:
    whole, short = run_ranks(2, _out_of_memory)
    assert whole == "Failed []"
    assert short.startswith("OutOfMemoryError [False, False") and "True" not in short


def _group_let_go(rank: int, world: int) -> bool:
    """Gloo's threads end with the last reference to a group, and have to before the interpreter does."""
    standing_in.LOOK = 0.01
    group = dist.new_group()
    problem = Divided(rank, world)
    optimizer = problem.optimizer(2)
    problem.train(optimizer)
    for _ in range(20):
        problem.meta_grad(optimizer, group=group)
        time.sleep(0.005)
    group, kept = None, weakref.ref(group)
    dist.destroy_process_group(kept())
    gc.collect()
    return kept() is None


def test_nobody_who_watches_keeps_a_group() -> None:
    assert run_ranks(2, _group_let_go) == [True, True]


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
