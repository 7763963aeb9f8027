"""Hooks on lambda act once, on the result; those on theta act on d; and `.grad` stays what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parallel import sharded_after_a_step
from problems import Bilevel, after_steps, flat, relative_error, same_bits, weight_net
from ranks import run_ranks
from torch import Tensor

import sama_kernels as sk
from sama_kernels.algorithms import BOME, F2SA

ALGORITHMS = ["sama", "sama_na", "t1_t2", "neumann", "iterative"]


def arguments(problem: Bilevel, optimizer: Any, algorithm: str) -> dict[str, Any]:
    theta = list(problem.net.parameters())
    adaptation = {"adaptation": "none"} if algorithm == "sama_na" else {}
    return {
        "base_params": theta, "meta_params": problem.lam, "optimizer": optimizer, "alpha": 1e-3, "algorithm": algorithm,
        **adaptation,
    }  # fmt: skip


def bound(g: Tensor) -> Tensor:
    """Not linear: of what is bounded in the passes no difference is left."""
    return g.clamp(-1e-6, 1e-6) - 2 * g


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_hooks_on_lambda_act_once(algorithm: str) -> None:
    problem = weight_net(seed=4)
    given = arguments(problem, after_steps(problem, 2), algorithm)
    plain = sk.meta_grad(problem.base_loss, problem.meta_loss, **given).grads
    seen: list[Tensor] = []
    handles = [p.register_hook(bound) for p in problem.lam]
    accumulated = [p.register_post_accumulate_grad_hook(seen.append) for p in problem.lam]
    hooks = [p._backward_hooks for p in problem.lam]
    assert all(map(same_bits, sk.meta_grad(problem.base_loss, problem.meta_loss, **given).grads, plain)) and not seen
    for p in problem.lam:
        p.grad = None
    sk.meta_backward(problem.base_loss, problem.meta_loss, **given)
    assert all(same_bits(p.grad, bound(g)) for p, g in zip(problem.lam, plain, strict=True))
    assert len(seen) == len(problem.lam)
    for p in problem.lam:
        p.grad = None
    sk.sama_loss(problem.base_loss, problem.meta_loss, **given).backward()
    assert all(same_bits(p.grad, bound(g)) for p, g in zip(problem.lam, plain, strict=True))
    assert all(p._backward_hooks is own and len(own) == 1 for p, own in zip(problem.lam, hooks, strict=True))
    for handle in (*handles, *accumulated):
        handle.remove()
    assert not any(p._backward_hooks for p in problem.lam)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_hooks_come_back_after_an_error(error: type[BaseException]) -> None:
    problem = weight_net(seed=5)
    given = arguments(problem, after_steps(problem, 2), "sama")
    fired: list[Tensor] = []
    problem.lam[0].register_hook(fired.append)
    calls = []

    def base_loss() -> Tensor:
        calls.append(None)
        if len(calls) == 2:
            raise error
        return problem.base_loss()

    with pytest.raises(error):
        sk.meta_grad(base_loss, problem.meta_loss, **given)
    assert not fired
    problem.base_loss().backward()
    assert len(fired) == 1


def test_hooks_that_a_closure_adds_stay() -> None:
    problem = weight_net(seed=6)
    given = arguments(problem, after_steps(problem, 2), "sama")
    lam, order = problem.lam[0], []
    lam.register_hook(lambda g: order.append("first"))

    def meta_loss() -> Tensor:
        lam.register_hook(lambda g: order.append("second"))
        return problem.meta_loss()

    sk.meta_grad(problem.base_loss, meta_loss, **given)
    order.clear()
    problem.base_loss().backward()
    assert order == ["first", "second"]


@pytest.mark.parametrize("kept", [False, True])
def test_lambda_that_retains_its_gradient(kept: bool) -> None:
    """It is no leaf; the gradient that it retains is that of the user's backward passes only."""
    problem = weight_net(seed=7)
    optimizer = after_steps(problem, 2)
    theta = list(problem.net.parameters())
    raw = torch.zeros(12, requires_grad=True, dtype=torch.float64)
    lam = raw * 2 + 1
    lam.retain_grad()
    if kept:
        lam.sum().backward(retain_graph=True)
    before = None if lam.grad is None else lam.grad.clone()
    residuals = torch.randn(12, 1, dtype=torch.float64)

    def base_loss() -> Tensor:
        return (lam[:, None] * (sum(p.square().sum() for p in theta) + residuals).square()).mean()

    out = sk.meta_grad(
        base_loss, problem.meta_loss, base_params=theta, meta_params=[lam], optimizer=optimizer, alpha=1e-3
    )
    assert out.grads[0].norm() > 0
    assert lam.grad is None if before is None else same_bits(lam.grad, before)


def test_a_mask_in_a_hook_on_theta_is_part_of_the_step() -> None:
    """Against autograd through an Adam step (torch.optim.Adam, first moments of zeros) of the masked gradient."""
    torch.manual_seed(8)
    theta = torch.randn(6, dtype=torch.float64, requires_grad=True)
    lam = torch.rand(6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1.0, 0, 0.5, 1, 0, 2], dtype=torch.float64)
    target = torch.randn(6, dtype=torch.float64)
    theta.register_hook(lambda g: g * mask)
    optimizer = torch.optim.Adam([theta], lr=0.1)

    def base_loss() -> Tensor:
        return (lam * (theta - target).square() + theta.prod() * lam.sum()).sum()

    def meta_loss() -> Tensor:
        return (theta + target).square().sum()

    for _ in range(3):
        optimizer.zero_grad()
        base_loss().backward()
        optimizer.step()
    out = sk.meta_grad(
        base_loss, meta_loss, base_params=[theta], meta_params=[lam], optimizer=optimizer, adaptation="exact",
        difference="exact",
    )  # fmt: skip
    state, at_step = optimizer.state[theta], theta.grad
    first, second = state["exp_avg"], state["exp_avg_sq"]  # with m and v of after the step
    g = at_step.clone().requires_grad_()
    m = first + 0.1 * (g - at_step)
    s = second + 0.001 * (g.square() - at_step.square()) + (mask == 0)  # masked cells do not count, and have s = 0
    step = 0.1 * (m / (1 - 0.9**3)) / ((s / (1 - 0.999**3)).sqrt() + 1e-8)
    d = 2 * (theta.detach() + target)
    (along,) = torch.autograd.grad(step, g, d)
    free = theta.detach().clone().requires_grad_()
    loss = (lam * (free - target).square() + free.prod() * lam.sum()).sum()
    (gradient,) = torch.autograd.grad(loss, free, create_graph=True)
    (expected,) = torch.autograd.grad((gradient * mask * along).sum(), lam)
    assert relative_error(out.grads[0], -expected) < 1e-9


@pytest.mark.parametrize("method", [F2SA, BOME])
def test_hooks_on_lambda_act_once_in_the_penalty_methods(method: Any) -> None:
    grads = []
    for hooked in (False, True):
        problem = weight_net(seed=9)
        if hooked:
            for p in problem.lam:
                p.register_hook(bound)
        method(problem.net, problem.lam, lr=1e-3, inner_lr=1e-2).step(problem.base_loss, problem.meta_loss)
        grads.append(flat([p.grad for p in problem.lam]))
    assert same_bits(grads[1], bound(grads[0]))


def _steps_in_hooks(rank: int, world: int) -> tuple[int, int, bool]:
    """FSDP runs hooks that follow the accumulation of a gradient, such as an optimizer's step, itself."""
    problem, optimizer = sharded_after_a_step(rank, world)
    fired: list[Tensor] = []
    params = [*problem.net.parameters(), *problem.weigher.parameters()]
    for p in params:
        p.register_post_accumulate_grad_hook(fired.append)
    problem.meta_grad(optimizer, sync="full")
    during = len(fired)
    problem.base_loss().backward()
    return during, len(fired), len(fired) == len(params)


def test_no_step_in_a_hook_is_made_in_a_meta_step_of_fsdp() -> None:
    for during, _, afterwards in run_ranks(2, _steps_in_hooks):
        assert during == 0 and afterwards
