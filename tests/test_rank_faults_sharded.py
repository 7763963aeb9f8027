"""A closure that raises on one rank, where the model's forward pass is a collective: all ranks raise, none waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parallel import Divided, bits_of
from problems import same_bits
from ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sama_kernels as sk

FAULTS = [("meta_loss", 1), ("base_loss", 1), ("base_loss", 2)]  # in pass 1, 2, 3


class Broken(Exception):
    """What the faulty closure raises."""


def _problem(rank: int, world: int, sharding: str) -> tuple[Divided, torch.optim.Optimizer]:
    problem = Divided(0, 1) if sharding == "tensor" else Divided(rank, world)
    problem.of_losses = False  # base_loss is called once per pass
    if sharding == "tensor":
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(problem.net, init_device_mesh("cpu", (world,)), plan)
    else:
        for layer in (problem.net[0], problem.net[2]) if sharding != "root" else ():
            fully_shard(layer)
        fully_shard(problem.net)
    if sharding == "lambda too":
        fully_shard(problem.weigher)
    optimizer = problem.optimizer(2)
    problem.train(optimizer)
    return problem, optimizer


def _local(x: Tensor) -> Tensor:
    return (x.to_local() if isinstance(x, DTensor) else x).detach()


def _everything(problem: Divided) -> list[Tensor]:
    params = [*problem.net.parameters(), *problem.weigher.parameters()]
    grads = [_local(p.grad) for p in params if p.grad is not None]
    return [*map(_local, params), *grads, torch.get_rng_state().view(torch.int16)]


def _faulty(original: Any, call: int, when: str) -> Any:
    """The closure, whose n-th call raises before or after the forward pass, or returns what is no loss."""
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls != call:
            return original()
        if when == "before":
            raise Broken("on purpose")
        loss = original()
        if when == "vector":
            return loss.expand(2)
        raise Broken("on purpose")

    return closure


def _faulty_steps(rank: int, world: int, bad: int, sharding: str, sync: str) -> list[str]:
    said = []
    for closure, call in FAULTS:
        for when in ("before", "after", "vector"):
            problem, optimizer = _problem(rank, world, sharding)
            problem.meta_grad(optimizer, sync=sync)
            before = bits_of(_everything(problem))
            original = getattr(problem, closure)
            if rank == bad:
                setattr(problem, closure, _faulty(original, call, when))
            try:
                problem.meta_grad(optimizer, sync=sync, update_base=True)
            except (Broken, RuntimeError, ValueError) as error:
                said.append(f"{type(error).__name__}: {error}")
                assert not getattr(error, "__notes__", [])
            for a, b in zip(before, _everything(problem), strict=True):
                assert same_bits(a, b)
            setattr(problem, closure, original)
            problem.train(optimizer, 1)  # the ranks go on together
            out = problem.meta_grad(optimizer, sync=sync)
            assert not out.degenerate and all(_local(g).isfinite().all() for g in out.grads)
    return said


@pytest.mark.parametrize(
    ("world", "bad", "sharding", "sync"),
    [
        (2, 1, "layers", "full"),
        (3, 0, "layers", "final"),
        (4, 2, "layers", "full"),
        (2, 0, "root", "full"),
        (2, 1, "lambda too", "full"),
        (2, 1, "tensor", "full"),
    ],
)
def test_a_closure_that_raises_on_one_rank(world: int, bad: int, sharding: str, sync: str) -> None:
    for rank, said in enumerate(run_ranks(world, _faulty_steps, bad, sharding, sync)):
        assert len(said) == 3 * len(FAULTS)
        for i, text in enumerate(said):
            if rank != bad:
                assert text.startswith(
                    f"Failed: base_loss, meta_loss: the meta step failed on rank {bad}, whose own error"
                )
            elif i % 3 == 2:
                assert "must return a scalar, got shape (2,)" in text
            else:
                assert text == "Broken: on purpose"


def _held(rank: int, world: int) -> list[float]:
    """Meta steps whose perturbed passes ask for values at theta, which is no failure; with and without a tape."""
    problem, optimizer = _problem(rank, world, "layers")
    original = problem.base_loss
    found = []
    for _ in range(3):
        problem.base_loss = _asking(original, problem.weigher)  # a new closure: nothing is known of it
        out = problem.meta_grad(optimizer, sync="full")
        found.append(float(sum(_local(g).double().sum() for g in out.grads)))
    return found


def _asking(original: Any, weigher: torch.nn.Module) -> Any:
    def base_loss() -> Tensor:
        loss: Tensor = original()
        return loss + sk.stop_gradient(loss) * sum(p.mean() for p in weigher.parameters())

    return base_loss


def test_asking_for_values_at_theta_is_no_failure() -> None:
    first, second = run_ranks(2, _held)
    assert first == second and all(abs(x) > 0 for x in first)


def _unequal_calls(rank: int, world: int) -> Tensor:
    """Two copies of a tensor-parallel model over two ranks each, one of which is called once more than the other."""
    problem = Divided(rank // 2, 2)
    problem.of_losses = False
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(problem.net, mesh["tensor"], plan)
    optimizer = problem.optimizer(2)
    problem.train(optimizer)
    original = problem.base_loss

    def base_loss() -> Tensor:
        loss: Tensor = original()
        return loss + 0 * problem.net(problem.base[0]).mean() if rank < 2 else loss

    problem.base_loss = base_loss  # type: ignore[method-assign]
    for _ in range(2):
        out = problem.meta_grad(optimizer, sync="final")
    return torch.cat([g.flatten() for g in out.grads])


def test_ranks_that_call_a_model_of_their_own_more_often() -> None:
    """No other rank has a part of it, so nobody waits for them in its forward pass."""
    first, *others = run_ranks(4, _unequal_calls)
    assert first.any() and all(torch.equal(first, x) for x in others)
