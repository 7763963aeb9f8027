"""What a recorded closure keeps alive: the held values of its last call, no graph, and for no longer than itself."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo  # as any optimizer does; an exception that it keeps holds the frames that first imported it
from problems import after_steps, meta_grad, weight_net
from torch import Tensor, nn

import sama_kernels as sk


@pytest.fixture(autouse=True)
def no_garbage_collector() -> Iterator[None]:
    """What is kept in a reference cycle is kept too long: a training loop allocates no cycle a step."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def living_tensors() -> int:
    return sum(issubclass(type(x), Tensor) for x in gc.get_objects())


class Marker:
    """Something that a graph keeps alive."""


def recorded_closure(net: nn.Module, seen: list[Any]) -> Any:
    def base_loss() -> Tensor:
        hidden = net(torch.ones(2, 3))
        held = sk.stop_gradient(hidden)
        on_graph = Marker()
        hidden.register_hook(lambda grad, marker=on_graph: None)
        seen[:] = [weakref.ref(hidden), weakref.ref(held), weakref.ref(on_graph)]
        return (held * hidden).sum()

    return sk.recorded(base_loss)


def test_held_values_live_as_long_as_the_closure() -> None:
    seen: list[Any] = []
    closure = recorded_closure(nn.Linear(3, 3), seen)
    loss = closure()
    hidden, held, node = seen
    assert held() is not None and node() is not None
    del loss
    assert hidden() is None and node() is None and held() is not None  # the graph is gone, the value is kept
    closure()
    assert held() is None and seen[1]() is not None  # until the next call
    last = seen[1]
    del closure
    assert last() is None


def test_a_call_that_fails_leaves_no_tape() -> None:
    seen: list[Any] = []
    fail: list[bool] = []

    @sk.recorded
    def base_loss() -> Tensor:
        held = sk.stop_gradient(torch.ones(3, requires_grad=True) * 2)
        seen.append(weakref.ref(held))
        if fail:
            raise ValueError("on purpose")
        return held.sum()

    base_loss()
    fail.append(True)
    with pytest.raises(ValueError, match="on purpose"):
        base_loss()
    assert seen[0]() is None and base_loss.recording.tape is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_training_does_not_accumulate_tensors(recorded: bool, compiled: bool) -> None:
    """New closures every step, as a loop makes them."""
    problem = weight_net(0, recorded=False)
    optimizer = after_steps(problem, 2)
    model = torch.compile(problem.net, backend="aot_eager") if compiled else problem.net
    x = torch.randn(24, 5, dtype=torch.float64)

    def step() -> None:
        def base_loss() -> Tensor:
            losses = model(x).square()
            return (problem.weigher(sk.stop_gradient(losses)) * losses).mean()

        problem.base_loss = sk.recorded(base_loss) if recorded else base_loss
        problem.meta_loss = lambda: model(x).square().mean()
        problem.step(optimizer)
        out = meta_grad(problem, optimizer)
        assert not out.degenerate

    for _ in range(3):  # compiles, and creates the gradients
        step()
    gc.collect()
    before = living_tensors()
    for _ in range(5):
        step()
    assert living_tensors() == before
