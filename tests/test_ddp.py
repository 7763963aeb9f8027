"""Models in DistributedDataParallel: whole trainings over several ranks against one process on the whole batch."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from parallel import BASE_ROWS, Divided, bits_of
from problems import flat, relative_error
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel as DDP

import sama_kernels as sk

ROUNDS = 4
WRAPPED: dict[str, dict[str, Any]] = {
    "theta": {"theta": {}},
    "lambda": {"lam": {}},
    "both": {"theta": {}, "lam": {}},
    "static graph": {"theta": {"static_graph": True}, "lam": {"static_graph": True}},
    "find unused": {"theta": {"find_unused_parameters": True}, "lam": {"find_unused_parameters": True}},
    "bucket views": {"theta": {"gradient_as_bucket_view": True}, "lam": {"gradient_as_bucket_view": True}},
    "no_sync": {"theta": {}, "no_sync": True},
    "update": {"theta": {}, "lam": {}, "update_base": True},
    "compiled": {"theta": {}, "compiled": True},
    "unequal batches": {"theta": {}, "lam": {}, "unequal": True},
    "odd bucket boundaries": {"theta": {}, "lam": {}, "bucket_mib": 100 / 2**20},
    "comm hook": {"theta": {}, "lam": {}, "unequal": True, "comm_hook": default_hooks.allreduce_hook},
}


def training(
    rank: int,
    world: int,
    theta: dict[str, Any] | None = None,
    lam: dict[str, Any] | None = None,
    no_sync: bool = False,
    compiled: bool = False,
    unequal: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Base steps and meta steps; the gradients of what is not in DDP are averaged by hand."""
    problem = Divided(rank, world, unequal=unequal)
    if world == 1:
        options = {name: option for name, option in options.items() if name == "update_base"}
    elif unequal:
        options["weight"] = problem.weight
    share = problem.weight[0] / BASE_ROWS * world  # DDP averages over ranks, not over rows
    net: nn.Module = problem.net
    if world > 1 and theta is not None:
        net = DDP(net, **theta)
    if world > 1 and lam is not None:
        problem.weigher = DDP(problem.weigher, **lam)
    if compiled:
        net = torch.compile(net, backend="aot_eager")
    problem.net = net
    base_optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    meta_optimizer = torch.optim.SGD(problem.weigher.parameters(), lr=5.0)
    for _ in range(ROUNDS):
        base_optimizer.zero_grad()
        if no_sync and world > 1:
            x, y = problem.base
            with net.no_sync():
                problem.loss(x[:3], y[:3]).mul(3 / len(x)).backward()
            problem.loss(x[3:], y[3:]).mul((len(x) - 3) / len(x)).backward()
        else:
            (problem.base_loss() * share).backward()
        if world > 1 and theta is None:
            _average(problem.net)
        base_optimizer.step()
        meta_optimizer.zero_grad()
        before = [p.grad for p in net.parameters()]
        sk.meta_backward(
            problem.base_loss, problem.meta_loss, base_params=net, meta_params=problem.weigher,
            optimizer=base_optimizer, alpha=0.1, sync="full", **options,
        )  # fmt: skip
        assert all(a is p.grad for a, p in zip(before, net.parameters(), strict=True))
        meta_optimizer.step()
    return {"theta": flat(bits_of(list(net.parameters()))), "lam": flat(bits_of(list(problem.weigher.parameters())))}


def _batch_norm(rank: int, world: int) -> list[Tensor]:
    """DDP broadcasts rank 0's running statistics before forward passes: not here, where they are to stay."""
    problem = Divided(rank, world)
    problem.net = DDP(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).double())
    optimizer = torch.optim.Adam(problem.net.parameters(), lr=0.02)
    for _ in range(2):
        problem.base_loss().backward()
        optimizer.step()
        buffers = bits_of(list(problem.net.buffers()))
        out = problem.meta_grad(optimizer, sync="full")
        assert all(torch.equal(a, b) for a, b in zip(buffers, problem.net.buffers(), strict=True))
        assert problem.net.require_backward_grad_sync and problem.net.require_forward_param_sync
        assert not out.degenerate or optimizer.state_dict()["state"][0]["step"] == 1
    return bits_of(list(problem.net.buffers()))


def test_running_statistics_stay_those_of_each_rank() -> None:
    first, second = run_ranks(2, _batch_norm)
    assert not torch.equal(first[0], second[0])  # each rank has seen its own rows


def _average(module: nn.Module) -> None:
    for p in module.parameters():
        torch.distributed.all_reduce(p.grad)
        p.grad /= torch.distributed.get_world_size()


def all_trainings(rank: int, world: int) -> dict[str, Any]:
    return {name: training(rank, world, **options) for name, options in WRAPPED.items()}


@cache
def results(world: int) -> list[dict[str, Any]]:
    return run_ranks(world, all_trainings)


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_training_is_that_of_one_process(world: int, name: str) -> None:
    expected = training(0, 1, **WRAPPED[name])
    untrained = flat(bits_of(list(Divided().weigher.parameters())))
    assert relative_error(expected["lam"], untrained) > 0.01
    for rank in results(world):
        assert relative_error(rank[name]["theta"], expected["theta"]) < 1e-9
        assert relative_error(rank[name]["lam"], expected["lam"]) < 1e-9
        for key in ("theta", "lam"):
            assert torch.equal(rank[name][key], results(world)[0][name][key])


def _final(rank: int, world: int, wrap: bool, alone: bool = False) -> Tensor:
    """The meta gradient of the paper's mode after steps on all rows; `alone`: of this rank only."""
    problem = Divided(rank, world, unequal=True)
    optimizer = problem.optimizer(2)
    problem.train(optimizer)
    if wrap:
        problem.net, problem.weigher = DDP(problem.net), DDP(problem.weigher)
    if alone:
        return flat(problem.meta_grad(optimizer, sync="none").grads) * problem.weight[0] / BASE_ROWS
    buckets = {"bucket_mib": 100 / 2**20, "comm_hook": default_hooks.allreduce_hook}
    return flat(problem.meta_grad(optimizer, sync="final", weight=problem.weight, **buckets).grads)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_final_is_the_average_of_what_each_rank_has_alone(world: int) -> None:
    expected = sum(_final(rank, world, wrap=False, alone=True) for rank in range(world))
    found = run_ranks(world, _final, True)
    assert all(relative_error(grads, expected) < 1e-11 and torch.equal(grads, found[0]) for grads in found)


class Gated(nn.Module):
    """Per-class weights; a rank uses only those of the classes that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.of_class = nn.ParameterList([nn.Parameter(torch.tensor(0.1 * k, dtype=torch.float64)) for k in range(3)])

    def forward(self, losses: Tensor, classes: Tensor) -> Tensor:
        parts = [
            torch.sigmoid(w) * losses[classes == k].sum() for k, w in enumerate(self.of_class) if (classes == k).any()
        ]
        return torch.stack(parts).sum() / len(losses)


def _unused(rank: int, world: int, wrap: bool, of: int | None = None) -> list[Tensor | None]:
    """`of`: one process on what so many have together. All ranks but the first have class 0 alone."""
    torch.manual_seed(0)
    net: nn.Module = nn.Linear(4, 1).double()
    x, y, classes = torch.randn(12, 4).double(), torch.randn(12, 1).double(), torch.zeros(12, dtype=torch.int64)
    classes[1:3] = 1
    gate: nn.Module = Gated()
    if wrap:
        gate = DDP(gate, find_unused_parameters=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    (net(x) - y).square().mean().backward()
    optimizer.step()
    own = 12 // (of or world)
    assert own >= 3  # the first rank has both
    rows = slice(0, 12) if of else slice(own * rank, own * rank + own)
    out = sk.meta_grad(
        lambda: gate((net(x[rows]) - y[rows]).square(), classes[rows]),
        lambda: (net(x[rows]) - y[rows]).square().mean(),
        base_params=net, meta_params=gate, optimizer=optimizer, sync="full", alpha=0.01,
    )  # fmt: skip
    return list(out.grads)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "DDP"])
def test_ranks_on_which_some_lambda_is_unused(wrap: bool, world: int) -> None:
    expected = _unused(0, 1, False, of=world)
    assert expected[0] != 0 and expected[1] != 0 and expected[2] == 0
    for grads in run_ranks(world, _unused, wrap):
        torch.testing.assert_close(grads, expected, rtol=1e-9, atol=0)
