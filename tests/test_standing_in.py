"""A rank that failed makes the collectives that others make: who is told what, and who cannot be."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
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
from torch import Tensor

import sama_kernels as sk
from sama_kernels.distributed import exchange, standing_in
from sama_kernels.distributed.meeting import Failed


class Broken(Exception):
    """What the faulty closure raises."""


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
