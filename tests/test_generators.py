"""Generator objects of the caller's own: both perturbed passes draw the same, and meta steps do not rewind them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import relative_error
from torch import Tensor

import sama_kernels as sk

SEED = 5


def of_torch() -> tuple[Any, Callable[[Any, int], Tensor]]:
    return torch.Generator().manual_seed(SEED), lambda g, n: torch.rand(n, generator=g, dtype=torch.float64)


def of_python() -> tuple[Any, Callable[[Any, int], Tensor]]:
    return random.Random(SEED), lambda g, n: torch.tensor([g.gauss(0, 1) for _ in range(n)], dtype=torch.float64)


def of_numpy() -> tuple[Any, Callable[[Any, int], Tensor]]:
    return np.random.default_rng(SEED), lambda g, n: torch.from_numpy(g.random(n))


def of_numpy_mt19937() -> tuple[Any, Callable[[Any, int], Tensor]]:
    return np.random.Generator(np.random.MT19937(SEED)), lambda g, n: torch.from_numpy(g.normal(size=n))


def of_numpy_legacy() -> tuple[Any, Callable[[Any, int], Tensor]]:
    # normal draws of RandomState come in pairs: an odd number leaves one for the next call
    return np.random.RandomState(SEED), lambda g, n: torch.from_numpy(g.randn(n))


KINDS = [of_torch, of_python, of_numpy, of_numpy_mt19937, of_numpy_legacy]
N = 7


class Noisy:
    """L_base = mean of s(lambda_i + held e_i) * e_i, e_i = (x_i theta + noise_i)^2; L_meta = |theta - c|^2 / 2."""

    def __init__(self, generator: Any, draw: Callable[[Any, int], Tensor]) -> None:
        self.generator, self.draw = generator, draw
        self.theta = torch.randn(3, dtype=torch.float64, requires_grad=True)
        self.lam = torch.randn(N, dtype=torch.float64, requires_grad=True)
        self.x, self.c = torch.randn(N, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
        self.meta_draws: list[Tensor] = []

    def loss_with(self, noise: Tensor) -> Tensor:
        each = (self.x @ self.theta + noise).square()
        return ((self.lam + sk.stop_gradient(each)).sigmoid() * each).mean()

    def base_loss(self) -> Tensor:
        return self.loss_with(self.draw(self.generator, N))

    def meta_loss(self) -> Tensor:
        return (self.theta - self.c).square().sum() / 2

    def drawing_meta_loss(self) -> Tensor:
        self.meta_draws.append(self.draw(self.generator, N))
        return self.meta_loss()

    def exact(self, noise: Tensor) -> Tensor:
        """-d/dlambda <dL_base/dtheta, d>, by double backward."""
        (g,) = torch.autograd.grad(self.loss_with(noise), self.theta, create_graph=True)
        return -torch.autograd.grad(g @ (self.theta - self.c).detach(), self.lam)[0]

    def meta_grad(self, base_loss: Callable[[], Tensor], meta_loss: Callable[[], Tensor], **options: Any) -> Any:
        return sk.meta_grad(
            base_loss, meta_loss, base_params=[self.theta], meta_params=[self.lam], optimizer=None, adaptation="none",
            **{"alpha": 1e-4, **options},
        )  # fmt: skip


@pytest.mark.parametrize("difference", ["central", "exact"])
@pytest.mark.parametrize("hold", ["auto", "center"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_passes_draw_the_same_noise(kind: Any, hold: str, difference: str) -> None:
    generator, draw = kind()
    problem = Noisy(generator, draw)
    out = problem.meta_grad(problem.base_loss, problem.meta_loss, hold=hold, difference=difference)
    again, draw = kind()
    noise = draw(again, N)
    assert relative_error(out.grads[0], problem.exact(noise)) < 1e-6
    # the meta loss draws nothing: the next call of the caller's gets what the passes had
    assert torch.equal(draw(generator, N), noise)


@pytest.mark.parametrize("kind", KINDS)
def test_a_meta_loss_that_draws_gets_other_numbers_every_time(kind: Any) -> None:
    generator, draw = kind()
    problem = Noisy(generator, draw)
    out = [problem.meta_grad(problem.base_loss, problem.drawing_meta_loss) for _ in range(2)]
    again, draw = kind()
    first, second, third = (draw(again, N) for _ in range(3))
    torch.testing.assert_close(problem.meta_draws, [first, second], rtol=0, atol=0)
    # each base pass goes on from where the meta loss left the generator
    for result, noise in zip(out, (second, third), strict=True):
        assert relative_error(result.grads[0], problem.exact(noise)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_closure_replays_the_noise_of_its_call(kind: Any) -> None:
    generator, draw = kind()
    problem = Noisy(generator, draw)
    recorded = sk.recorded(problem.base_loss)
    again, _ = kind()
    for _ in range(3):  # code that is known, and not
        noise = draw(again, N)
        recorded()
        out = problem.meta_grad(recorded, problem.meta_loss)
        assert relative_error(out.grads[0], problem.exact(noise)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_code_that_gets_a_generator_later(kind: Any) -> None:
    """Its first calls reach none, so that the next does not search. The meta step finds one and does not take the tape,
    whose noise cannot be drawn again; after that calls are recorded with it."""
    generator, draw = kind()
    problem = Noisy(None, lambda _, n: torch.zeros(n, dtype=torch.float64))
    recorded = sk.recorded(problem.base_loss)
    recorded()
    problem.meta_grad(recorded, problem.meta_loss)
    problem.generator, problem.draw = generator, draw
    recorded()
    again, _ = kind()
    _, second = draw(again, N), draw(again, N)
    out = problem.meta_grad(recorded, problem.meta_loss)
    assert relative_error(out.grads[0], problem.exact(second)) < 1e-6
    recorded()
    assert torch.equal(draw(generator, N), draw(again, N))
    out = problem.meta_grad(recorded, problem.meta_loss)
    assert relative_error(out.grads[0], problem.exact(second)) < 1e-6


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_iterative_draws_anew_for_every_step(kind: Any, checkpoint: bool) -> None:
    """Against two steps of gradient descent written out, with the noise of a twin; the meta loss draws after them."""
    generator, draw = kind()
    problem = Noisy(generator, draw)
    model = torch.nn.Module()
    model.theta = torch.nn.Parameter(problem.theta.detach().clone())

    def loss_at(theta: Tensor, noise: Tensor) -> Tensor:
        return (problem.lam.sigmoid() * (problem.x @ theta + noise).square()).mean()

    def meta_at(theta: Tensor, noise: Tensor) -> Tensor:
        return (theta - problem.c).square().sum() + (noise[:3] * theta).sum()

    method = sk.algorithms.Iterative(steps=2, checkpoint=checkpoint)
    again, _ = kind()
    for _ in range(2):
        out = sk.meta_grad(
            lambda: loss_at(model.theta, draw(generator, N)), lambda: meta_at(model.theta, draw(generator, N)),
            base_params=model, meta_params=[problem.lam], optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            algorithm=method,
        )  # fmt: skip
        theta = problem.theta.detach().clone().requires_grad_()
        for _ in range(2):
            (g,) = torch.autograd.grad(loss_at(theta, draw(again, N)), theta, create_graph=True)
            theta = theta - 0.1 * g
        (exact,) = torch.autograd.grad(meta_at(theta, draw(again, N)), problem.lam)
        assert relative_error(out.grads[0], exact) < 1e-12


@pytest.mark.parametrize("method", [sk.algorithms.F2SA, sk.algorithms.BOME])
@pytest.mark.parametrize("kind", [*KINDS, None])
def test_penalty_methods_draw_alike_within_a_step_and_anew_in_the_next(kind: Any, method: Any) -> None:
    """Also if the meta loss alone draws, and from torch's global generator."""
    generator, draw = (None, lambda _, n: torch.rand(n)) if kind is None else kind()
    net, lam, x = torch.nn.Linear(3, 1).double(), torch.zeros(N, 1, requires_grad=True), torch.ones(N, 3).double()
    base_draws: list[tuple[float, ...]] = []
    meta_draws: list[tuple[float, ...]] = []

    def base_loss() -> Tensor:
        noise = torch.zeros(N) if kind is None else draw(generator, N)
        base_draws.append(tuple(noise.tolist()))
        return (lam.sigmoid() * (net(x) - noise[:, None]).square()).mean()

    def meta_loss() -> Tensor:
        noise = draw(generator, N)
        meta_draws.append(tuple(noise.tolist()))
        return (net(x) - noise[:, None]).square().mean()

    solver = method(net, [lam], lr=1e-3, inner_lr=1e-2)
    for step in range(3):
        base_draws.clear()
        solver.step(base_loss, meta_loss)
        assert len(set(base_draws)) == 1
        assert len(set(meta_draws)) == step + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ["t1_t2", "conjugate_gradient", "sama"])
def test_after_an_error_a_generator_is_where_it_was(kind: Any, algorithm: str) -> None:
    generator, draw = kind()
    problem = Noisy(generator, draw)

    def failing() -> Tensor:
        problem.base_loss()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        problem.meta_grad(failing, problem.drawing_meta_loss, algorithm=algorithm)
    again, _ = kind()
    assert torch.equal(draw(generator, N), draw(again, N))


def test_system_random_is_left_alone() -> None:
    """`random.SystemRandom` has no state to go back to."""
    problem = Noisy(random.SystemRandom(), lambda g, n: torch.full((n,), g.random() * 0, dtype=torch.float64))
    out = problem.meta_grad(problem.base_loss, problem.meta_loss)
    assert relative_error(out.grads[0], problem.exact(torch.zeros(N, dtype=torch.float64))) < 1e-6
