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
