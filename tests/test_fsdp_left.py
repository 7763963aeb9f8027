"""FSDP models whose forward pass an exception has left, frozen ones, and what several processes weigh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel import Divided
from problems import flat, relative_error
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import sama_kernels as sk
from sama_kernels.algorithms import BOME, F2SA, T1T2, Iterative
from sama_kernels.distributed import fsdp


class Holding(nn.Module):
    """Asks for a held value, or fails, in the middle of its forward pass; nested, as the root stays gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 1)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if self.fails:
            raise KeyError("in the middle")
        return self.last(hidden * sk.stop_gradient(hidden).square().mean(1, keepdim=True))  # type: ignore[no-any-return]


def _problem(rank: int, world: int, sharded: bool) -> tuple[Divided, Any]:
    problem = Divided(rank, world)
    torch.manual_seed(1)
    net: Any = Holding().double()
    problem.net, problem.of_losses = net, False
    if sharded:
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(net.first, mesh=mesh)
        fully_shard(net, mesh=mesh)
    return problem, torch.optim.SGD(net.parameters(), lr=0.1)


def _meta_grad(problem: Divided, optimizer: Any, sync: str, **options: Any) -> Tensor:
    out = sk.meta_grad(
        lambda: problem.base_loss(), problem.meta_loss, base_params=problem.net, meta_params=problem.weigher,
        optimizer=optimizer, adaptation="none", alpha=0.5, sync=sync, **options,
    )  # fmt: skip
    return flat(out.grads)


def _held_inside(rank: int, world: int, sharded: bool) -> list[Tensor]:
    problem, optimizer = _problem(rank if sharded else 0, world if sharded else 1, sharded)
    return [_meta_grad(problem, optimizer, "full" if sharded else "none") for _ in range(2)]


def test_a_value_held_inside_a_sharded_forward_pass() -> None:
    """Without a recording the first pass breaks off where it is asked for: the root was left gathered at theta+."""
    exact = run_ranks(2, _held_inside, False)[0][1]
    for first, second in run_ranks(2, _held_inside, True):
        assert relative_error(first, exact) < 1e-9 and relative_error(second, exact) < 1e-9


def _failing_inside(rank: int, world: int) -> tuple[Tensor, Tensor, float]:
    problem, optimizer = _problem(rank, world, True)
    before = problem.base_loss().detach()
    expected = _meta_grad(problem, optimizer, "full")
    plain, calls = problem.meta_loss, []

    def meta_loss() -> Tensor:
        calls.append(None)
        loss = plain()
        problem.net.fails = True  # type: ignore[assignment]  # from the perturbed passes on
        return loss

    problem.meta_loss = meta_loss  # type: ignore[method-assign]
    with pytest.raises(KeyError, match="in the middle"):
        _meta_grad(problem, optimizer, "full")
    problem.net.fails, problem.meta_loss = False, plain  # type: ignore[assignment, method-assign]
    after = problem.base_loss().detach()
    return before, after, relative_error(_meta_grad(problem, optimizer, "full"), expected)


def test_a_sharded_forward_pass_that_failed_at_theta_plus() -> None:
    for before, after, error in run_ranks(2, _failing_inside):
        assert torch.equal(before, after) and error < 1e-12


def _frozen_backbone(rank: int, world: int, whole: bool) -> Tensor:
    problem = Divided(0 if whole else rank, 1 if whole else world, unequal=True)
    backbone = nn.Linear(5, 5).double().requires_grad_(False)
    head = problem.net
    problem.net = nn.Sequential(backbone, head)
    problem.of_losses = False
    if not whole:
        fully_shard(backbone, mesh=init_device_mesh("cpu", (world,)))
    out = sk.meta_grad(
        problem.base_loss, problem.meta_loss, base_params=head, meta_params=problem.weigher, optimizer=None,
        adaptation="none", alpha=1e-4, sync="none" if whole else "full", weight=None if whole else problem.weight,
    )  # fmt: skip
    return flat(out.grads)


def test_unequal_weights_with_a_frozen_sharded_backbone() -> None:
    """FSDP averages no gradient of theta or lambda there, and the losses must not be scaled for it."""
    exact = run_ranks(2, _frozen_backbone, True)[0]
    for got in run_ranks(2, _frozen_backbone, False):
        assert relative_error(got, exact) < 1e-6


def _group_of_half_the_mesh(rank: int, world: int, weighted: bool) -> str:
    problem, optimizer = _problem(rank, world, True)
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    weight = {"weight": problem.weight} if weighted else {}
    try:
        _meta_grad(problem, optimizer, "full", group=halves[rank // 2], **weight)
    except ValueError as error:
        return str(error)
    return ""


def test_weights_of_a_group_of_half_the_mesh() -> None:
    """FSDP averages over all of the mesh, so that shares of a half's sum were the wrong ones, without a word."""
    for rank, said in enumerate(run_ranks(4, _group_of_half_the_mesh, True)):
        assert said.startswith(f"weight: fully_shard averages gradients over rank {2 if rank < 2 else 0} too")
    assert run_ranks(4, _group_of_half_the_mesh, False) == [""] * 4


def _ignored(rank: int, world: int) -> tuple[set[str], set[str]]:
    mesh = init_device_mesh("cpu", (world,))
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    net[0].weight = nn.Parameter(distribute_tensor(net[0].weight.detach(), mesh, [Shard(0)]))
    fully_shard(net, mesh=mesh, ignored_params={net[0].weight})
    names = {id(p): name for name, p in net.named_parameters()}
    return {names[i] for i in fsdp.managed(fsdp.fsdp_modules([net]))}, set(names.values())


def test_dtensors_that_fsdp_ignores_are_not_its_own() -> None:
    """Nobody averages their gradients."""
    for managed, everything in run_ranks(2, _ignored):
        assert managed == everything - {"0.weight"} and len(everything) == 4


def _weights(rank: int, world: int, algorithm: Any) -> Tensor:
    net, lam = nn.Linear(1, 1, bias=False).double(), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    out = sk.meta_grad(
        lambda: net.weight.square().sum() * (1 + lam.sum()), lambda: lam[rank] + 0 * net.weight.sum(), base_params=net,
        meta_params=[lam], optimizer=optimizer, algorithm=algorithm, sync="final", weight=(1, 3 if rank == 0 else 1),
    )  # fmt: skip
    return out.grads[0]


@pytest.mark.parametrize("algorithm", [T1T2(), Iterative(steps=1)], ids=["T1T2", "Iterative"])
def test_what_the_meta_loss_of_a_rank_counts_for(algorithm: Any) -> None:
    for got in run_ranks(2, _weights, algorithm):
        torch.testing.assert_close(got, torch.tensor([0.75, 0.25], dtype=torch.float64), rtol=1e-12, atol=1e-12)


def _penalty(rank: int, world: int, method: Any) -> str:
    problem = Divided(rank, world)
    solver = method(problem.net, problem.weigher, lr=0.1, inner_lr=0.1)
    with pytest.raises(NotImplementedError) as caught:
        solver.step(problem.base_loss, problem.meta_loss)
    return str(caught.value)


@pytest.mark.parametrize("method", [F2SA, BOME])
def test_penalty_methods_are_for_one_process(method: Any) -> None:
    for said in run_ranks(2, _penalty, method):
        assert said.startswith(f"{method.__name__} exchanges nothing between processes")
