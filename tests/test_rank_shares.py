"""Ranks that count for nothing, parameters of which only some are sharded, groups that come and go."""

from __future__ import annotations

import torch
import torch.distributed as dist
from parallel import Divided, bits_of
from ranks import run_ranks
from torch.distributed.fsdp import fully_shard

from sama_kernels.distributed import agreement


def weight_zero(rank: int, world: int) -> None:
    """Rank 0 counts for nothing. At Adam's first step nobody has a derivative: zeros, not 0 / 0."""
    for sync in ("final", "full"):
        for steps in (1, 3):
            problem = Divided(rank, world)
            optimizer = torch.optim.AdamW(problem.net.parameters(), lr=0.01)
            problem.train(optimizer, steps)
            out = problem.meta_grad(optimizer, sync=sync, weight=float(rank))
            assert bool(out.degenerate) == (steps == 1)
            assert all(g.isfinite().all() and bool(g.any()) == (steps == 3) for g in out.grads), (sync, steps)
            if steps == 3:
                alone = Divided(1, world)
                adam = torch.optim.AdamW(alone.net.parameters(), lr=0.01)
                alone.train(adam, steps)
                expected = alone.meta_grad(adam, sync="none")
                for g, e in zip(out.grads, expected.grads, strict=True):
                    torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


def test_a_rank_that_counts_for_nothing() -> None:
    run_ranks(2, weight_zero)


def partly_sharded(rank: int, world: int) -> None:
    """One layer of two is sharded: the result of one process on all rows."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    whole = Divided()
    adam = torch.optim.AdamW(whole.net.parameters(), lr=0.01)
    whole.train(adam)
    expected = whole.meta_grad(adam, sync="none")
    for options in ({"sync": "full"}, {"sync": "final", "update_base": True}):
        problem = Divided(rank, world)
        fully_shard(problem.net[2], mesh=mesh)
        optimizer = torch.optim.AdamW(problem.net.parameters(), lr=0.01)
        problem.train(optimizer)  # on all rows: the same plain gradients on every rank
        out = problem.meta_grad(optimizer, **options)
        torch.testing.assert_close(out.norm, expected.norm, rtol=1e-9, atol=0)
        for g, e in zip(out.grads, expected.grads, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-7, atol=1e-10)


def test_some_parameters_are_sharded() -> None:
    run_ranks(2, partly_sharded)


def stochastic(rank: int, world: int) -> None:
    """Ranks with seeds of their own move bfloat16 parameters alike."""
    torch.manual_seed(7 + rank)
    problem = Divided(rank, world, dtype=torch.bfloat16)
    torch.manual_seed(7 + rank)
    optimizer = torch.optim.AdamW(problem.net.parameters(), lr=0.01)
    problem.train(optimizer)
    before = bits_of(list(problem.net.parameters()))
    problem.meta_grad(optimizer, sync="full", update_base=True, rounding="stochastic", alpha=0.01)
    for p in problem.net.parameters():
        first = p.detach().float()
        dist.broadcast(first, 0)
        assert p.detach().float().equal(first), float((p.detach().float() - first).abs().max())
    assert any(not p.detach().equal(old) for p, old in zip(problem.net.parameters(), before, strict=True))


def test_all_ranks_round_alike() -> None:
    run_ranks(2, stochastic)


def another_group(rank: int, world: int) -> None:
    """What a destroyed group agreed on is forgotten with it: its id may come back on one rank alone."""
    group = dist.new_group([0, 1])
    agreement.agree(group, {"sync": "full"}, torch.device("cpu"))
    assert len(agreement._agreed) == 1
    dist.destroy_process_group(group)
    del group
    assert len(agreement._agreed) == 0
    agreement.agree(None, {"sync": "full"}, torch.device("cpu"))
    assert len(agreement._agreed) == 1


def test_groups_come_and_go() -> None:
    run_ranks(2, another_group)
