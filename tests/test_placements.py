"""DTensors whose gradients lie elsewhere, on some of the ranks, or beside plain tensors; and options that differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parallel import Divided
from problems import flat, relative_error
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.utils import clip_grad_norm_

import sama_kernels as sk


class Sequential(nn.Module):
    """A layer norm and two linear layers, whose inputs are batch x sequence x 6."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(self.norm(x))))
        return out


def _sequence_parallel(rank: int, world: int, kind: str, options: dict[str, Any]) -> tuple[Tensor, float, bool]:
    """The meta gradient and ||v|| after two steps, and whether a .grad of the norm was still a sum to be made."""
    torch.manual_seed(0)
    net, lam = Sequential().double(), torch.randn(6, dtype=torch.float64, requires_grad=True)
    x, y, x_meta, y_meta = torch.randn(4, 3, 4, 6, dtype=torch.float64)
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        plan = {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Replicate()),
        }
        parallelize_module(net, mesh, plan)
        x, x_meta = (DTensor.from_local(t, mesh, [Replicate()]).redistribute(mesh, [Shard(1)]) for t in (x, x_meta))

    def base_loss() -> Tensor:
        return ((net(x) - y).square() * lam.exp()).mean()

    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3, foreach=False),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, eps=1e-3, foreach=False),
    }
    optimizer = make[kind](list(net.parameters()))
    for _ in range(2):
        optimizer.zero_grad()
        base_loss().backward()
        partial = any(p.is_partial() for p in getattr(net.norm.weight.grad, "placements", ()))
        optimizer.step()
    out = sk.meta_grad(
        base_loss, lambda: (net(x_meta) - y_meta).square().mean(), base_params=net, meta_params=[lam],
        optimizer=optimizer, alpha=1e-4, **options,
    )  # fmt: skip
    return out.grads[0], float(out.norm), partial


@pytest.mark.parametrize(
    ("kind", "options"),
    [("adamw", {}), ("rmsprop", {}), ("sgd", {"clip_value": 0.02})],
    ids=["adamw", "rmsprop", "clip"],
)
def test_gradients_of_sequence_parallel_norms(kind: str, options: dict[str, Any]) -> None:
    """Their .grad holds addends, which the optimizer adds up for itself; D is taken at the sum."""
    exact, norm, _ = _sequence_parallel(0, 1, kind, options)
    for got, of_rank, partial in run_ranks(2, _sequence_parallel, kind, options):
        assert partial and of_rank == pytest.approx(norm, rel=1e-12)
        assert relative_error(got, exact) < 1e-8


def _expanded(rank: int, world: int, which: str) -> Tensor:
    """A gradient that is one number expanded has to be copied, into the layout of this rank's part."""
    mesh = init_device_mesh("cpu", (world,))
    theta = nn.Parameter(torch.arange(4, dtype=torch.float64) / 4)
    lam = nn.Parameter(torch.full((4,), 0.5, dtype=torch.float64))
    if which == "theta":
        theta = nn.Parameter(distribute_tensor(theta.detach(), mesh, [Replicate()]))
    else:
        lam = nn.Parameter(distribute_tensor(lam.detach(), mesh, [Replicate()]))

    def whole(x: Tensor) -> Tensor:
        return x.full_tensor() if isinstance(x, DTensor) else x

    out = sk.meta_grad(
        lambda: whole(lam.sum()) * whole(theta.sum()), lambda: whole(theta.sum()), base_params=[theta],
        meta_params=[lam], optimizer=None, adaptation="none", alpha=1e-3,
    )  # fmt: skip
    return whole(out.grads[0])


@pytest.mark.parametrize("which", ["theta", "lambda"])
def test_an_expanded_gradient_of_a_replicated_dtensor(which: str) -> None:
    """L_base = sum(lambda) sum(theta), L_meta = sum(theta): every entry is -4."""
    for got in run_ranks(2, _expanded, which):
        torch.testing.assert_close(got, torch.full((4,), -4.0, dtype=torch.float64), rtol=1e-9, atol=0)


def _partly_sharded(rank: int, world: int, sync: str, whole: bool) -> tuple[Tensor, float] | str:
    problem = Divided(0 if whole else rank, 1 if whole else world)
    problem.of_losses = False
    if not whole:
        fully_shard(problem.net[0], mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1)
    try:
        out = sk.meta_grad(
            problem.base_loss, problem.meta_loss, base_params=problem.net, meta_params=problem.weigher,
            optimizer=optimizer, adaptation="none", alpha=1e-4, sync="none" if whole else sync,
        )  # fmt: skip
    except ValueError as error:
        return str(error)
    return flat(out.grads), float(out.epsilon)


@pytest.mark.parametrize("sync", ["final", "full"])
def test_theta_of_which_fsdp_has_a_part(sync: str) -> None:
    """Ranks put theta+- together from parts that all of them have moved, so v has to be one: d is averaged."""
    exact, epsilon = run_ranks(2, _partly_sharded, sync, True)[0]
    for got, of_rank in run_ranks(2, _partly_sharded, sync, False):
        assert of_rank == pytest.approx(epsilon, rel=1e-9) and relative_error(got, exact) < 1e-6


def test_theta_of_which_fsdp_has_a_part_cannot_be_left_alone() -> None:
    for said in run_ranks(2, _partly_sharded, "none", False):
        assert said.startswith('sync: "none" would perturb base_params along another v on each rank')


def _on_some_ranks(rank: int, world: int, how: str) -> str:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "parts"))
    problem = Divided(rank, world)
    group = None
    if how == "fsdp":
        fully_shard(problem.net, mesh=mesh["parts"])
    else:
        parallelize_module(problem.net, mesh["parts"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        group = mesh["data"].get_group()
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1)
    with pytest.raises(ValueError) as caught:
        sk.meta_grad(
            problem.base_loss, problem.meta_loss, base_params=problem.net, meta_params=problem.weigher,
            optimizer=optimizer, adaptation="none", sync="full", group=group,
        )  # fmt: skip
    return str(caught.value)


@pytest.mark.parametrize("how", ["fsdp", "tensor parallel"])
def test_a_mesh_that_lacks_ranks_of_the_group(how: str) -> None:
    """Nobody would average d over the other dimension. In size the tensor-parallel mesh and the group are the same."""
    for said in run_ranks(4, _on_some_ranks, how):
        assert said.startswith("base_params: tensor 0 is a DTensor of which rank")


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alpha": ({"alpha": 0.1}, {"alpha": 0.01}),
    "difference": ({"difference": "central"}, {"difference": "exact"}),
    "adaptation": ({"adaptation": "paper"}, {"adaptation": "exact"}),
    "algorithm": ({}, {"algorithm": "neumann"}),
    "clip_coef": ({}, {"clip_coef": 0.5}),
    "clip_value": ({"clip_value": 0.5}, {"clip_value": 0.6}),
}


def _disagreeing(rank: int, world: int, name: str) -> tuple[str, bool]:
    problem = Divided(rank, world)
    optimizer = problem.optimizer(0)
    problem.train(optimizer)
    before = flat(list(problem.net.parameters()))
    with pytest.raises(ValueError) as caught:
        problem.meta_grad(optimizer, sync="final", **OPTIONS[name][rank])
    return str(caught.value), torch.equal(before, flat(list(problem.net.parameters())))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_the_ranks_do_not_share(name: str) -> None:
    """Two different methods would be averaged."""
    for said, kept in run_ranks(2, _disagreeing, name):
        assert said.startswith(f"{name}: the ranks disagree: rank 0 has") and kept


def _clipped(rank: int, world: int, whole: bool) -> tuple[Tensor, bool]:
    problem = Divided()
    if not whole:
        fully_shard(problem.net, mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=0.1)
    problem.base_loss().backward()
    total = clip_grad_norm_(problem.net.parameters(), 0.01)
    optimizer.step()
    out = sk.meta_grad(
        problem.base_loss, problem.meta_loss, base_params=problem.net, meta_params=problem.weigher,
        optimizer=optimizer, alpha=1e-4, clip_coef=sk.clip_coef(total, 0.01), sync="none" if whole else "full",
    )  # fmt: skip
    return flat(out.grads), isinstance(total, DTensor)


def test_the_norm_that_clipping_of_sharded_parameters_returns() -> None:
    exact, _ = run_ranks(2, _clipped, True)[0]
    for got, sharded in run_ranks(2, _clipped, False):
        assert sharded and relative_error(got, exact) < 1e-7


def _hypernetwork(rank: int, world: int, whole: bool) -> Tensor:
    problem = Divided()
    if not whole:
        fully_shard(problem.net, mesh=init_device_mesh("cpu", (world,)))
    seed = torch.full((), 0.3, dtype=torch.float64, requires_grad=True)
    lam = (seed * torch.arange(1, 25, dtype=torch.float64)).sin()
    x, y = problem.base
    loss = sk.sama_loss(
        lambda: (lam.sigmoid() * (problem.net(x) - y).square()[:, 0]).mean(),
        lambda: problem.meta_loss() + lam.square().mean(), base_params=problem.net, meta_params=[lam], optimizer=None,
        adaptation="none", alpha=1e-4, sync="none" if whole else "full",
    )  # fmt: skip
    loss.backward()
    assert seed.grad is not None
    return seed.grad


def test_lambda_computed_by_a_hypernetwork_that_the_meta_loss_reads() -> None:
    """FSDP's gradients come through `.backward()`, which freed the caller's graph behind lambda."""
    exact = run_ranks(2, _hypernetwork, True)[0]
    for got in run_ranks(2, _hypernetwork, False):
        torch.testing.assert_close(got, exact, rtol=1e-7, atol=0)
