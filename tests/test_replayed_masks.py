"""Pass 3 takes its dropout masks from pass 2 instead of drawing them, and nobody can tell the difference."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import after_steps, meta_grad, same_bits, weight_net
from test_real_models import classifier, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sama_kernels as sk
from sama_kernels.replayed_masks import ReplayedMasks


class CountDraws(TorchDispatchMode):
    """Counts the masks that are drawn inside the block."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.bernoulli_.float
        return func(*args, **(kwargs or {}))


def without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReplayedMasks, "_use", lambda _, target, probability: target.bernoulli_(probability))


def meta_step_on_bert() -> tuple[sk.MetaGradient, Tensor]:
    problem = classifier(dropout=0.1, dtype=torch.float32)
    optimizer = torch.optim.Adam(problem.theta, lr=1e-3)
    torch.manual_seed(3)
    for _ in range(2):
        problem.step(optimizer)
    return run(problem, optimizer), torch.get_rng_state()


def test_no_bit_changes_on_a_real_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory, state = meta_step_on_bert()
    without_memory(monkeypatch)
    plain, plain_state = meta_step_on_bert()
    assert not with_memory.degenerate and torch.equal(state, plain_state)
    assert all(map(same_bits, with_memory.grads, plain.grads))
    assert same_bits(with_memory.base_loss_minus, plain.base_loss_minus)


def test_pass_3_draws_nothing() -> None:
    problem = classifier(dropout=0.1, dtype=torch.float32)
    optimizer = torch.optim.Adam(problem.theta, lr=1e-3)
    for _ in range(2):
        problem.step(optimizer)
    with CountDraws() as one_pass:
        problem.meta_loss()
    with CountDraws() as all_passes:
        run(problem, optimizer)
    assert one_pass.count == 8  # 3 in each of 2 layers, the embeddings, the classifier
    assert all_passes.count == 2 * one_pass.count  # meta loss and pass 2


Draw = Callable[[], Tensor]


def random_draw(rng: random.Random) -> Draw:
    p, n = rng.choice([0.1, 0.5]), rng.choice([1, 7, 300])
    return rng.choice(
        [
            lambda: F.dropout(torch.ones(n), p),
            lambda: F.dropout(torch.ones(n, 3, dtype=torch.float64).t(), p),
            lambda: torch.rand(n),
            lambda: torch.randn(n),
            lambda: torch.empty(n).bernoulli_(p),
            lambda: F.dropout(torch.ones(n), p, training=False),
        ]
    )


@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_of_draws_comes_out_as_without_memory(seed: int) -> None:
    """The second block leaves draws out, adds some and changes their order: each is still what it would have been."""
    rng = random.Random(seed)
    first = [random_draw(rng) for _ in range(12)]
    second = [d if rng.random() < 0.8 else random_draw(rng) for d in first if rng.random() < 0.95]
    masks = ReplayedMasks()
    torch.manual_seed(seed)
    start = torch.get_rng_state()
    with masks.kept():
        for draw in first:
            draw()
    torch.set_rng_state(start)
    with masks.used():
        got = [draw() for draw in second]
    state = torch.get_rng_state()
    torch.set_rng_state(start)
    assert all(map(torch.equal, got, [draw() for draw in second]))
    assert torch.equal(state, torch.get_rng_state())


def test_a_generator_of_ones_own_is_left_alone() -> None:
    masks = ReplayedMasks()
    generator = torch.Generator().manual_seed(1)
    with masks.kept():
        first = torch.empty(50).bernoulli_(0.5, generator=generator)
    with masks.used():
        second = torch.empty(50).bernoulli_(0.5, generator=generator)
    assert not torch.equal(first, second)


def test_recomputed_activations_see_the_masks_of_their_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpointing recomputes in the backward pass, outside the block, from the generator's state in the forward."""

    def once() -> sk.MetaGradient:
        problem = weight_net(0)

        def base_loss() -> Tensor:
            torch.manual_seed(8)
            losses = (problem.net(torch.randn(24, 5, dtype=torch.float64)) - 1).square()

            def weigh(x: Tensor) -> Tensor:
                return problem.weigher(F.dropout(x, 0.5))

            return (checkpoint(weigh, sk.stop_gradient(losses), use_reentrant=False) * losses).mean()

        problem.base_loss = base_loss
        return meta_grad(problem, after_steps(problem, 0))

    got = once()
    without_memory(monkeypatch)
    assert all(map(same_bits, got.grads, once().grads))
    assert got.grads[0].norm() > 0


def test_compiled_models_stay_compiled() -> None:
    """torch.compile gives up inside most dispatch modes; not inside this one."""
    frames = 0

    def backend(graph: Any, _: Any) -> Any:
        def run(*args: Any) -> Any:
            nonlocal frames
            frames += 1
            return graph.forward(*args)

        return run

    compiled = torch.compile(lambda x: F.dropout(x * 2, 0.5), backend=backend, fullgraph=True)
    masks = ReplayedMasks()
    state = torch.get_rng_state()
    with masks.kept():
        first = compiled(torch.ones(100))
    torch.set_rng_state(state)
    with masks.used():
        second = compiled(torch.ones(100))
    assert frames == 2 and torch.equal(first, second)
