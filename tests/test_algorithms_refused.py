"""What the algorithms with second derivatives refuse: one error each, that names the cure, before anything moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parallel import Divided
from problems import after_steps, meta_grad, same_bits, snapshot, weight_net
from ranks import run_ranks
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import sama_kernels as sk
from sama_kernels.algorithms import Iterative, Neumann


def test_loss_scaling() -> None:
    problem = weight_net(0, dtype=torch.float32)
    optimizer = after_steps(problem, 0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    before = snapshot(problem.theta)
    with pytest.raises(NotImplementedError, match="grad_scaler: Neumann takes losses as they are; use autocast"):
        meta_grad(problem, optimizer, algorithm="neumann", grad_scaler=scaler)
    assert all(same_bits(a, b) for a, b in zip(before, problem.theta, strict=True))


def _refused(rank: int, world: int, algorithm: Any, sync: str) -> str:
    problem = Divided(rank, world)
    optimizer = problem.optimizer(0)
    problem.train(optimizer)
    with pytest.raises(NotImplementedError) as caught:
        problem.meta_grad(optimizer, algorithm=algorithm, sync=sync)
    return str(caught.value)


def test_several_processes() -> None:
    for said in run_ranks(2, _refused, Neumann(), "full"):
        assert said.startswith('sync: "full" is for SAMA; with Neumann use "final"')
    for said in run_ranks(2, _refused, Iterative(advance=True), "final"):
        assert said.startswith("algorithm: Iterative(advance=True) would lead every process elsewhere")


def _sharded(rank: int, world: int) -> str:
    net = nn.Linear(4, 2, bias=False)
    mesh = init_device_mesh("cpu", (world,))
    net.weight = nn.Parameter(distribute_tensor(torch.ones(2, 4), mesh, [Shard(0)]))
    lam = torch.ones((), requires_grad=True)
    with pytest.raises(NotImplementedError) as caught:
        sk.meta_grad(
            lambda: lam * net.weight.square().sum().full_tensor(), lambda: net.weight.sum().full_tensor(),
            base_params=net, meta_params=[lam], optimizer=None, adaptation="none", algorithm="conjugate_gradient",
            sync="final",
        )  # fmt: skip
    return str(caught.value)


def test_sharded_parameters() -> None:
    for said in run_ranks(2, _sharded):
        assert "ConjugateGradient does not take sharded parameters; use SAMA" in said


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"base_loss": lambda p: 1.0}, TypeError, "base_loss: must return a scalar tensor, got float"),
        ({"base_loss": lambda p: p.net(torch.ones(2, 5).double())}, ValueError, "base_loss: must return a scalar, got"),
        ({"base_loss": lambda p: p.base_loss().detach()}, ValueError, "base_loss: its result has no gradient"),
        ({"meta_loss": lambda p: torch.ones(())}, ValueError, "meta_loss: its result has no gradient"),
        ({"base_loss": lambda p: p.meta_loss()}, ValueError, "meta_params: neither base_loss nor meta_loss reads any"),
    ],
    ids=["number", "vector", "detached", "constant meta loss", "without lambda"],
)
def test_losses_that_iterative_cannot_use(
    changed: dict[str, Any], error: type[Exception], words: str, checkpoint: bool
) -> None:
    problem = weight_net(3, recorded=False)
    optimizer = after_steps(problem, 0)
    before = snapshot(problem.theta)
    losses = {"base_loss": lambda p: p.base_loss(), "meta_loss": lambda p: p.meta_loss(), **changed}
    with pytest.raises(error, match=words):
        sk.meta_grad(
            lambda: losses["base_loss"](problem), lambda: losses["meta_loss"](problem), base_params=problem.net,
            meta_params=problem.weigher, optimizer=optimizer, algorithm=Iterative(steps=2, checkpoint=checkpoint),
        )  # fmt: skip
    assert all(same_bits(a, b) for a, b in zip(before, problem.theta, strict=True))
