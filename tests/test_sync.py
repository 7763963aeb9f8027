"""sync="final", "full" and "none" on real processes, against one process in float64."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel import Divided, bits_of
from problems import OPTIMIZERS, flat, relative_error
from ranks import run_ranks
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import sama_kernels as sk
from sama_kernels.distributed import agreement

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "unequal batches": {"unequal": True},
    "one bucket per tensor": {"bucket_mib": 1e-9},
    "odd bucket boundaries": {"bucket_mib": 100 / 2**20},
    "microbatches": {"microbatches": True},
    "explicit": {"explicit": True, "unequal": True},
    "forward": {"difference": "forward"},
    "exact": {"difference": "exact", "explicit": True},
    "relative alpha": {"alpha": sk.relative(0.01)},
    "values at theta": {"hold": "center"},
    "SAMA-NA": {"adaptation": "none"},
    "clipping of the norm": {"clip_coef": 0.5, "clip_rank_one": True, "case": 0},
    "clipping of values": {"clip_value": 0.05, "case": 0},
    "comm hook": {"comm_hook": default_hooks.allreduce_hook},
    "update": {"update_base": True, "unequal": True},
    "update, forward": {"update_base": True, "difference": "forward"},
    **{optimizer.__name__ + str(case): {"case": case} for case, (optimizer, _) in enumerate(OPTIMIZERS)},
}


def one_case(
    rank: int, world: int, sync: str, case: int = 2, unequal: bool = False, explicit: bool = False, **options: Any
) -> dict[str, Any]:
    """The meta step of a rank; of the whole batch if world is 1."""
    problem = Divided(rank, world, unequal=unequal)
    problem.explicit = explicit
    optimizer = problem.optimizer(case)
    problem.train(optimizer)
    theta = bits_of(list(problem.net.parameters()))
    if unequal and world > 1:
        options["weight"] = problem.weight
    if world == 1:
        options = {k: v for k, v in options.items() if k not in ("bucket_mib", "comm_hook")}
    out = problem.meta_grad(optimizer, sync=sync, **options)
    after = bits_of(list(problem.net.parameters()))
    losses = torch.stack([out.meta_loss, out.base_loss_plus, out.base_loss_minus])
    return {
        "grads": flat(out.grads), "losses": losses, "norm": out.norm, "epsilon": out.epsilon, "weight": problem.weight,
        "degenerate": bool(out.degenerate), "moved": [not torch.equal(a, b) for a, b in zip(theta, after, strict=True)],
        "theta": flat(after),
    }  # fmt: skip


def all_cases(rank: int, world: int) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (name, sync): one_case(rank, world, sync, **options)
        for name, options in CASES.items()
        for sync in ("final", "full")
    }


@cache
def results(world: int) -> list[dict[tuple[str, str], dict[str, Any]]]:
    return run_ranks(world, all_cases)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_full_is_one_process_on_the_whole_batch(world: int, name: str) -> None:
    expected = one_case(0, 1, "none", **CASES[name])
    for got in (rank[name, "full"] for rank in results(world)):
        assert relative_error(got["grads"], expected["grads"]) < 1e-9
        for key in ("losses", "norm", "epsilon", "theta"):
            torch.testing.assert_close(got[key], expected[key], rtol=1e-10, atol=0)
        assert got["moved"] == expected["moved"] and not got["degenerate"]
        first = results(world)[0][name, "full"]
        assert all(torch.equal(got[key], first[key]) for key in ("grads", "norm", "epsilon", "theta", "losses"))


@pytest.mark.parametrize("name", [name for name in CASES if "update" not in name])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_final_is_the_average_of_what_each_rank_has_alone(world: int, name: str) -> None:
    options = CASES[name]
    alone = [one_case(rank, world, "none", **_single(options)) for rank in range(world)]
    # What the meta loss says of lambda counts as the meta batch does, the rest as the base batch.
    counts = [a["weight"] if options.get("unequal") else (1.0, 1.0) for a in alone]
    base, meta = (torch.tensor(x, dtype=torch.float64) / sum(x) for x in zip(*counts, strict=True))
    explicit = [_explicit(rank, world, **options) for rank in range(world)]
    parts = zip(base, meta, alone, explicit, strict=True)
    expected = sum(b * (a["grads"] - e) + m * e for b, m, a, e in parts)
    for rank, result in enumerate(results(world)):
        got = result[name, "final"]
        assert relative_error(got["grads"], expected) < 1e-11
        assert torch.equal(got["norm"], alone[rank]["norm"])  # its own v
        assert torch.equal(got["grads"], results(world)[0][name, "final"]["grads"])


def _explicit(rank: int, world: int, explicit: bool = False, unequal: bool = False, **_: Any) -> Tensor:
    """dL_meta/dlambda."""
    problem = Divided(rank, world, unequal=unequal)
    problem.explicit = explicit
    params = list(problem.weigher.parameters())
    grads = torch.autograd.grad(problem.meta_loss(), params, allow_unused=True)
    return flat([torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)])


def _single(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k not in ("bucket_mib", "comm_hook")}


@pytest.mark.parametrize("name", [name for name in CASES if "update" in name])
def test_final_with_an_update_keeps_the_ranks_in_step(name: str) -> None:
    for result in results(3):
        got, full = result[name, "final"], result[name, "full"]
        assert (
            all(got["moved"]) and torch.equal(got["theta"], full["theta"]) and torch.equal(got["grads"], full["grads"])
        )


def _no_weight(rank: int, world: int, update_base: bool) -> dict[str, Any]:
    problem = Divided(rank, world)
    optimizer = problem.optimizer(2)
    problem.train(optimizer)
    theta = bits_of(list(problem.net.parameters()))
    found = {}
    for sync in ("final", "full"):
        for name, weight in (("base", (0.0, 1.0)), ("meta", (1.0, 0.0)), ("both", 0.0)):
            out = problem.meta_grad(optimizer, sync=sync, weight=weight, update_base=update_base)
            unmoved = all(map(torch.equal, theta, bits_of(list(problem.net.parameters()))))
            found[f"{sync} {name}"] = (bool(out.degenerate), float(flat(out.grads).abs().max()), unmoved)
    return found


@pytest.mark.parametrize("update_base", [False, True])
def test_no_rank_counts_for_anything(update_base: bool) -> None:
    """A mean over nothing: no NaN that would go into lambda, or theta."""
    for found in run_ranks(2, _no_weight, update_base):
        assert set(found.values()) == {(True, 0.0, True)}, found


def test_the_modes_differ() -> None:
    """What the paper leaves out: each rank perturbs along its own v."""
    final, full = (results(2)[0]["plain", sync]["grads"] for sync in ("final", "full"))
    assert relative_error(final, full) > 0.01


def _other_kinds(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["none"] = one_case(rank, world, "none")["grads"]
    for dtype in (torch.float32, torch.bfloat16):
        problem = Divided(rank, world, dtype=torch.float32)
        problem.weigher.to(dtype)
        inner, problem.weigher = problem.weigher, _Cast(problem.weigher, dtype)
        optimizer = problem.optimizer(2)
        problem.train(optimizer)
        for name, hook in (
            ("sum", None),
            ("bf16", default_hooks.bf16_compress_hook),
            ("fp16", default_hooks.fp16_compress_hook),
        ):
            out = problem.meta_grad(optimizer, sync="final", comm_hook=hook)
            assert all(g.dtype == p.dtype for g, p in zip(out.grads, inner.parameters(), strict=True))
            found[f"{name} {dtype}"] = flat([g.double() for g in out.grads])
        found[f"alone {dtype}"] = flat([g.double() for g in problem.meta_grad(optimizer, sync="none").grads])
    return found


class _Cast(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.to(self.dtype)).to(x.dtype)


def test_none_and_other_dtypes_and_compressed_buckets() -> None:
    ranks = run_ranks(2, _other_kinds)
    for rank, found in enumerate(ranks):
        assert torch.equal(found["none"], one_case(rank, 2, "none")["grads"])
        for dtype in (torch.float32, torch.bfloat16):
            mean = sum(r[f"alone {dtype}"] for r in ranks) / 2
            eps = torch.finfo(dtype).eps
            assert relative_error(found[f"sum {dtype}"], mean) < 4 * eps
            for name, compressed in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
                error = relative_error(found[f"{name} {dtype}"], mean)
                assert error < 4 * max(eps, torch.finfo(compressed).eps)
                assert error > 0


def _scaled(rank: int, world: int) -> Tensor:
    """With a GradScaler; at last the gradients of the last pass overflow on one rank alone."""
    problem, scaler = Divided(rank, world, dtype=torch.float32), torch.amp.GradScaler("cpu", init_scale=1024.0)
    problem.explicit = True
    optimizer = problem.optimizer(2)
    problem.train(optimizer, scaler=scaler)
    grads = flat(problem.meta_grad(optimizer, sync="full", grad_scaler=scaler).grads)
    theta = bits_of(list(problem.net.parameters()))
    if rank == 1:
        original, calls = problem.loss, []

        def overflowing(x: Tensor, y: Tensor) -> Tensor:
            calls.append(None)
            return original(x, y) * (1e37 if len(calls) == 2 else 1.0)

        problem.loss = overflowing
    problem.of_losses = False
    out = problem.meta_grad(optimizer, sync="full", grad_scaler=scaler, update_base=True)
    if world > 1:
        assert out.degenerate and not any(g.any() for g in out.grads)
        assert all(torch.equal(a, b) for a, b in zip(theta, problem.net.parameters(), strict=True))
    return grads


def test_scaled_losses_that_overflow_on_one_rank() -> None:
    expected = _scaled(0, 1)
    for grads in run_ranks(2, _scaled):
        assert relative_error(grads, expected) < 1e-3  # float32 differences


def _hypernetwork(rank: int, world: int) -> Tensor:
    """lambda is made of other tensors, and the meta loss has another term in these."""
    problem = Divided(rank, world)
    optimizer = problem.optimizer(2)
    problem.train(optimizer)
    x, y = problem.base
    source = torch.linspace(-1, 1, 5).double().requires_grad_()
    made = (source * 2).tanh()
    loss = sk.sama_loss(
        lambda: (torch.sigmoid(x @ made)[:, None] * (problem.net(x) - y).square()).mean(), problem.meta_loss,
        base_params=problem.net, meta_params=[made], optimizer=optimizer, alpha=0.1, sync="full",
    )  # fmt: skip
    (loss + made.square().sum()).backward()
    assert source.grad is not None
    return source.grad


def test_lambda_that_is_not_a_leaf() -> None:
    expected = _hypernetwork(0, 1)
    for got in run_ranks(2, _hypernetwork):
        assert relative_error(got, expected) < 1e-9


def _groups(rank: int, world: int) -> Any:
    pairs = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2])]
    problem = Divided(rank % 2, 2)
    optimizer = problem.optimizer(2)
    problem.train(optimizer)
    mine = pairs[rank // 2]
    grads = flat(problem.meta_grad(optimizer, sync="full", group=mine).grads)
    with pytest.raises(ValueError, match="group: this rank is not a member"):
        problem.meta_grad(optimizer, sync="full", group=pairs[1 - rank // 2])
    return grads


def test_a_group_is_the_ranks_that_agree() -> None:
    pair_0, pair_1, alone = run_ranks(3, _groups)
    assert torch.equal(pair_0, pair_1)
    assert relative_error(pair_0, one_case(0, 1, "none")["grads"]) < 1e-9
    assert relative_error(alone, one_case(0, 2, "none")["grads"]) < 1e-12


def _living_tensors(rank: int, world: int) -> list[int]:
    """After each of some meta steps, without the garbage collector."""
    problem = Divided(rank, world)
    optimizer = problem.optimizer(2)
    problem.train(optimizer)
    counts = []
    gc.disable()
    for _ in range(4):
        problem.meta_grad(optimizer, sync="full")
        counts.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    return counts


def test_nothing_of_a_meta_step_is_kept() -> None:
    for counts in run_ranks(2, _living_tensors):
        assert max(counts) - min(counts) <= 2  # gloo's thread lets go of the last two that were sent a little later


class Group:
    """Of processes; weak references to it are kept, which a plain object does not allow."""


def test_objects_are_sent_from_the_gpu_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL takes the current one, which is the same on all ranks where nobody has called torch.cuda.set_device."""
    current = [torch.device("cuda", 0)]

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def gather(everyone: list[Any], own: Any, group: Any) -> None:
        assert current[-1] == torch.device("cuda", 1)
        everyone[:] = [own] * 2

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(agreement, "all_say", lambda group, word: True)  # through a store, from no device
    agreement.agree(Group(), {"sync": "full"}, torch.device("cuda", 1))
    assert current == [torch.device("cuda", 0)]
