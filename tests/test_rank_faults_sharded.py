"""A rank that raises where the model's passes are collectives: before, within or after them, all raise, none waits."""

from __future__ import annotations

from collections.abc import Sequence
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
from sama_kernels.distributed import standing_in

FAULTS = [("meta_loss", 1), ("base_loss", 1), ("base_loss", 2)]  # in pass 1, 2, 3
WITHIN = ("within", "backward")
WHEN = ("before", "after", "vector", *WITHIN)
PLAN = {"0": ColwiseParallel(), "2": RowwiseParallel()}


class Broken(Exception):
    """What the faulty closure raises."""


def _problem(rank: int, world: int, sharding: str) -> tuple[Divided, torch.optim.Optimizer]:
    rank, world_of_data = {"tensor": (0, 1), "layers of parts": (rank // 2, 2)}.get(sharding, (rank, world))
    problem = Divided(rank, world_of_data)
    problem.of_losses = False  # base_loss is called once per pass
    options: dict[str, Any] = {"reshard_after_forward": sharding != "kept"}
    if sharding in ("hybrid", "layers of parts"):
        names = ("data", "other")
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=names)
        options["mesh"] = mesh if sharding == "hybrid" else mesh["data"]
    if sharding == "tensor":
        parallelize_module(problem.net, init_device_mesh("cpu", (world,)), PLAN)
    elif sharding == "layers of parts":
        parallelize_module(problem.net, mesh["other"], PLAN)
    if sharding != "tensor":
        for layer in (problem.net[0], problem.net[2]) if sharding != "root" else ():
            fully_shard(layer, **options)
        fully_shard(problem.net, **options)
    if sharding == "lambda too":
        for layer in (problem.weigher[0], problem.weigher[2], problem.weigher):
            fully_shard(layer)
    if sharding == "compiled":
        torch._dynamo.config.skip_nnmodule_hook_guards = False  # or compiled code would not call a hook that is new
        problem.net.compile(backend="aot_eager")
    optimizer = problem.optimizer(2)
    problem.train(optimizer)
    return problem, optimizer


def _local(x: Tensor) -> Tensor:
    return (x.to_local() if isinstance(x, DTensor) else x).detach()


def _everything(problem: Divided) -> list[Tensor]:
    params = [*problem.net.parameters(), *problem.weigher.parameters()]
    grads = [_local(p.grad) for p in params if p.grad is not None]
    return [*map(_local, params), *grads, torch.get_rng_state().view(torch.int16)]


def _faulty(problem: Divided, closure: str, call: int, when: str, here: bool) -> Any:
    """Lets the n-th call of a closure raise: before the forward pass, within it, after it, within the backward pass, or
    as it returns what is no loss. Not `here`: only as new a closure as those of other ranks, which is evaluated once
    more where there is compiled code. Returns: what mends it."""
    original = getattr(problem, closure)
    calls, net = 0, problem.net if closure == "meta_loss" else problem.weigher

    def broken(*_: Any) -> Tensor:
        raise Broken("on purpose")

    @torch.compiler.disable
    def within(module: Any, inputs: Any, output: Tensor) -> None:
        if when == "within":
            broken()
        output.register_hook(broken)

    def faulty() -> Tensor:
        nonlocal calls
        calls += 1
        if calls != call or not here:
            return original()
        if when == "before":
            broken()
        layer = net[1] if when == "backward" else problem.net[1]
        handle = layer.register_forward_hook(within) if when in ("within", "backward") else None
        try:
            loss = original()
        finally:
            if handle is not None:
                handle.remove()
        return loss.expand(2) if when == "vector" else broken() if when == "after" else loss

    setattr(problem, closure, faulty)
    return lambda: setattr(problem, closure, original)


def _faulty_steps(rank: int, world: int, bad: int, sharding: str, sync: str, when_tried: Sequence[str]) -> list[str]:
    said = []
    standing_in.LOOK = 0.02  # s, which the other ranks take to notice
    problem, optimizer = _problem(rank, world, sharding)
    problem.meta_grad(optimizer, sync=sync)
    problem.train(optimizer, 1)
    expected = problem.meta_grad(optimizer, sync=sync)
    for closure, call in FAULTS:
        for when in when_tried:
            problem, optimizer = _problem(rank, world, sharding)
            problem.meta_grad(optimizer, sync=sync)
            before = bits_of(_everything(problem))
            # The second evaluation of compiled code is one that looks for detached values, without a backward pass.
            at = 3 if sharding == "compiled" and call == 2 else call
            mend = _faulty(problem, closure, at, when, here=rank == bad)
            try:
                problem.meta_grad(optimizer, sync=sync, update_base=True)
            except (Broken, RuntimeError, ValueError) as error:
                said.append(f"{type(error).__name__}: {error}")
                assert not getattr(error, "__notes__", [])
            for a, b in zip(before, _everything(problem), strict=True):
                assert same_bits(a, b)
            mend()
            problem.train(optimizer, 1)  # the ranks go on together, as if nothing had been
            out = problem.meta_grad(optimizer, sync=sync)
            assert not out.degenerate
            for a, b in zip(out.grads, expected.grads, strict=True):
                assert same_bits(_local(a), _local(b))
            assert any(_local(g).any() for g in out.grads)
    return said


@pytest.mark.parametrize(
    ("world", "bad", "sharding", "sync", "when_tried"),
    [
        (2, 1, "layers", "full", WHEN),
        (3, 0, "layers", "final", WHEN),
        (4, 2, "layers", "full", WITHIN),
        (2, 0, "root", "full", WITHIN),
        (3, 1, "kept", "full", WITHIN),
        (2, 1, "lambda too", "full", WHEN),
        (4, 3, "hybrid", "full", WITHIN),
        (2, 1, "tensor", "full", WHEN),
        (4, 1, "layers of parts", "full", WITHIN),
        (2, 0, "compiled", "full", WITHIN),
    ],
)
def test_a_rank_that_raises(world: int, bad: int, sharding: str, sync: str, when_tried: Sequence[str]) -> None:
    for rank, said in enumerate(run_ranks(world, _faulty_steps, bad, sharding, sync, when_tried)):
        assert len(said) == len(when_tried) * len(FAULTS)
        for text, when in zip(said, [*when_tried] * len(FAULTS), strict=True):
            if rank != bad:
                assert text.startswith(
                    f"Failed: base_loss, meta_loss: the meta step failed on rank {bad}, whose own error"
                )
            elif when == "vector":
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
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(problem.net, mesh["tensor"], PLAN)
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


def _interrupted(rank: int, world: int) -> list[Tensor]:
    """Ctrl-C, which every rank gets, within the backward pass of a sharded model; and what the next step finds."""
    found = []
    for interrupted in (False, True):
        problem, optimizer = _problem(rank, world, "layers")
        problem.meta_grad(optimizer, sync="full")
        if interrupted:
            handle = problem.net[1].register_forward_hook(_interrupt_in_backward)
            before = bits_of(_everything(problem))
            with pytest.raises(KeyboardInterrupt):
                problem.meta_grad(optimizer, sync="full")
            assert all(map(same_bits, before, _everything(problem)))
            handle.remove()
        problem.train(optimizer, 1)
        out = problem.meta_grad(optimizer, sync="full")
        found.append(torch.cat([_local(g).flatten() for g in out.grads]))
    return found


def _interrupt_in_backward(module: Any, inputs: Any, output: Tensor) -> None:
    def interrupt(grad: Tensor) -> Tensor:
        raise KeyboardInterrupt

    output.register_hook(interrupt)


def test_an_interrupt_within_a_backward_pass() -> None:
    for never, after in run_ranks(2, _interrupted):
        assert same_bits(never, after) and never.any()
