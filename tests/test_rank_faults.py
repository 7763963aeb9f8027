"""Ranks that fail: nobody waits for ever, everybody learns of it, and theta is what it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel import Divided, bits_of
from problems import flat, relative_error, same_bits
from ranks import run_ranks
from torch import Tensor

import sama_kernels as sk

FAULTS = [("meta_loss", 1), ("base_loss", 1), ("base_loss", 2)]  # in pass 1, 2, 3


class Broken(Exception):
    """What the faulty closure raises."""


class Fault:
    """Makes the n-th call of a closure go wrong on one rank."""

    def __init__(self, problem: Divided, closure: str, call: int, effect: Any) -> None:
        self.calls, self.original = 0, getattr(problem, closure)

        def faulty() -> Tensor:
            self.calls += 1
            return effect(self.original()) if self.calls == call else self.original()

        setattr(problem, closure, faulty)


def _trained(rank: int, world: int) -> tuple[Divided, torch.optim.Optimizer]:
    problem = Divided(rank, world)
    problem.of_losses = False  # base_loss is called once per pass
    optimizer = problem.optimizer(2)
    problem.train(optimizer)
    return problem, optimizer


def _raise(_: Tensor) -> Tensor:
    raise Broken("on purpose")


def _everything(problem: Divided, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    params = [*problem.net.parameters(), *problem.weigher.parameters()]
    return [*params, *(p.grad for p in params if p.grad is not None), torch.get_rng_state().view(torch.int16)]


def _faulty_steps(rank: int, world: int, bad: int, sync: str) -> list[str]:
    said = []
    for closure, call in FAULTS:
        for update_base in (False, True):
            problem, optimizer = _trained(rank, world)
            before = bits_of(_everything(problem, optimizer))
            if rank == bad:
                Fault(problem, closure, call, _raise)
            try:
                problem.meta_grad(optimizer, sync=sync, update_base=update_base)
            except (Broken, RuntimeError) as error:
                said.append(f"{type(error).__name__}: {error}")
            for a, b in zip(before, _everything(problem, optimizer), strict=True):
                assert same_bits(a, b)
            out = problem.meta_grad(optimizer, sync=sync)  # the ranks go on together
            assert not out.degenerate and all(g.isfinite().all() for g in out.grads)
    return said


@pytest.mark.parametrize(("world", "bad", "sync"), [(2, 1, "final"), (3, 0, "full"), (4, 2, "full")])
def test_a_closure_that_raises_on_one_rank(world: int, bad: int, sync: str) -> None:
    for rank, said in enumerate(run_ranks(world, _faulty_steps, bad, sync)):
        assert len(said) == 2 * len(FAULTS)
        for text in said:
            if rank == bad:
                assert text == "Broken: on purpose"
            else:
                assert text.startswith(f"Failed: base_loss, meta_loss: the meta step failed on rank {bad},")


def _in_a_group(rank: int, world: int) -> str:
    group = torch.distributed.new_group([1, 2])
    if rank == 0:
        return ""
    problem, optimizer = _trained(rank, world)
    if rank == 2:
        Fault(problem, "base_loss", 1, _raise)
    with pytest.raises((Broken, RuntimeError)) as failure:
        problem.meta_grad(optimizer, group=group)
    with pytest.raises(ValueError) as difference:
        problem.meta_grad(optimizer, group=group, bucket_mib=float(rank))
    return f"{failure.value} {difference.value}"


def test_ranks_of_a_group_are_named_as_among_all() -> None:
    _, well, broken = run_ranks(3, _in_a_group)
    assert "the meta step failed on rank 2, whose" in well and "on purpose" in broken
    for said in (well, broken):
        assert "bucket_mib: the ranks disagree: rank 1 has 1.0, rank 2 has 2.0" in said


def _not_finite(rank: int, world: int, sync: str) -> None:
    for closure, call in FAULTS:
        problem, optimizer = _trained(rank, world)
        before = bits_of(_everything(problem, optimizer))
        if rank == 1:
            Fault(problem, closure, call, lambda loss: loss * float("nan"))
        out = problem.meta_grad(optimizer, sync=sync, update_base=True)
        assert out.degenerate and not any(g.any() for g in out.grads)
        for a, b in zip(before, _everything(problem, optimizer), strict=True):
            assert same_bits(a, b)


@pytest.mark.parametrize(("world", "sync"), [(2, "final"), (3, "full"), (4, "final")])
def test_a_loss_that_is_not_finite_on_one_rank(world: int, sync: str) -> None:
    run_ranks(world, _not_finite, sync)


def _different(rank: int, world: int, agreed: bool) -> list[str]:
    """What the ranks that call differently are told: at once, or when they have made a meta step alike."""
    problem, optimizer = _trained(rank, world)
    lam = list(problem.weigher.parameters())
    last = rank == world - 1
    said = []

    def step(mine: list[Tensor], **options: Any) -> None:
        before = bits_of(_everything(problem, optimizer))
        try:
            sk.meta_grad(
                problem.base_loss, problem.meta_loss, base_params=problem.net, meta_params=mine, optimizer=optimizer,
                **options,
            )  # fmt: skip
        except ValueError as error:
            said.append(str(error))
        for a, b in zip(before, _everything(problem, optimizer), strict=True):
            assert same_bits(a, b)

    for mine, options in (
        (lam if last else lam[:3], {}),
        (lam, {"sync": "full" if last else "final"}),
        (lam[::-1] if last else lam, {}),
        (lam, {"alpha": 0.5 if last else 1.0}),
    ):
        if agreed:
            step(lam[:3])
            step(lam)
            step(lam[::-1])
            step(lam, sync="full")
            step(lam, alpha=0.5)
        step(mine, **options)
    step(lam)  # they can go on together
    return said


@pytest.mark.parametrize(("world", "agreed"), [(2, False), (2, True), (3, True), (4, True)])
def test_ranks_that_call_differently(world: int, agreed: bool) -> None:
    """Also where each has made such a call before, so that nothing that it says is new to it."""
    first, *others = run_ranks(world, _different, agreed)
    assert all(said == first for said in others) and len(first) == 4
    last = world - 1
    assert first[0].startswith(f"meta_params: the ranks disagree: rank 0 has 3 tensors, rank {last} has 4 tensors")
    assert first[1].startswith(f"sync: the ranks disagree: rank 0 has 'final', rank {last} has 'full'")
    assert first[2].startswith("meta_params: the ranks disagree")
    assert first[3].startswith(f"alpha: the ranks disagree: rank 0 has 1.0, rank {last} has 0.5")


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist
from parallel import Divided
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
problem = Divided(rank, world)
problem.of_losses = False
if {sharded}:
    from torch.distributed.fsdp import fully_shard
    fully_shard(problem.net)
optimizer = problem.optimizer(2)
meta_optimizer = torch.optim.SGD(problem.weigher.parameters(), lr=0.5)
original, calls = problem.base_loss, 0
def base_loss():
    global calls
    calls += 1
    if rank == 1 and calls == 5:  # in a perturbed pass of the third step
        os.kill(os.getpid(), signal.SIGKILL)
    return original()
problem.base_loss = base_loss
for step in range(100):
    problem.train(optimizer, 1)
    out = problem.meta_grad(optimizer, sync="full")
    for p, g in zip(problem.weigher.parameters(), out.grads):
        p.grad = g
    meta_optimizer.step()
    if rank == 0 and not {sharded}:
        state = {{"net": problem.net.state_dict(), "lam": problem.weigher.state_dict(), "step": step}}
        torch.save(state, {out!r} + ".new")
        os.replace({out!r} + ".new", {out!r})
"""


def _killed(folder: Path, sharded: bool) -> None:
    script = folder / "train.py"
    tests, out = str(Path(__file__).parent), str(folder / "checkpoint.pt")
    script.write_text(SCRIPT.format(tests=tests, out=out, sharded=sharded))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert f"exitcode  : -{int(signal.SIGKILL)}" in done.stderr, done.stderr


def test_a_killed_rank_ends_the_job_and_the_last_checkpoint_is_whole(tmp_path: Path) -> None:
    _killed(tmp_path, sharded=False)
    saved = torch.load(tmp_path / "checkpoint.pt")
    expected = Divided()
    expected.of_losses = False
    optimizer = expected.optimizer(2)
    meta_optimizer = torch.optim.SGD(expected.weigher.parameters(), lr=0.5)
    for _ in range(saved["step"] + 1):
        expected.train(optimizer, 1)
        out = expected.meta_grad(optimizer)
        for p, g in zip(expected.weigher.parameters(), out.grads, strict=True):
            p.grad = g
        meta_optimizer.step()
    assert saved["step"] == 1
    for key, module in (("net", expected.net), ("lam", expected.weigher)):
        assert relative_error(flat(list(saved[key].values())), flat(list(module.state_dict().values()))) < 1e-9


def test_a_killed_rank_of_a_sharded_model_ends_the_job(tmp_path: Path) -> None:
    """The other one, in a collective of the model's, raises, and finds nobody to stand in with."""
    _killed(tmp_path, sharded=True)
