"""Base losses with gradients of their own and with questions about theta: noticed where the passes see another function
than the base gradient does, and right with difference="exact"."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain import Plain
from problems import relative_error
from torch import Tensor, nn

import sama_kernels as sk


def by_grad(e: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.grad(e(x).sum(), x)[0]


def by_backward(e: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x.grad = None
    e(x).sum().backward(inputs=[x])
    assert x.grad is not None
    return x.grad


def by_tensor_method(e: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x.grad = None
    torch.autograd.backward(e(x).sum(), inputs=[x])
    assert x.grad is not None
    return x.grad.clone()


def by_jacobian(e: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    found: Tensor = torch.autograd.functional.jacobian(lambda y: e(y).sum(), x)  # type: ignore[no-untyped-call]
    return found


GRADIENTS = [by_grad, by_backward, by_tensor_method, by_jacobian]


def fresh(source: str, **names: Any) -> Any:
    """A function with a code object of its own, as the watch looks at every piece of code once."""
    scope: dict[str, Any] = {"torch": torch, "sk": sk, **names}
    exec(f"def base():\n    {source}", scope)
    return scope["base"]


def expected(problem: Plain, base_loss: Callable[[], Tensor]) -> Tensor:
    """-d/dlambda <g, d> by double backward at theta; what autograd takes for constants is constant."""
    d = torch.autograd.grad(problem.meta_loss(), problem.theta)
    g = torch.autograd.grad(base_loss(), problem.theta, create_graph=True, allow_unused=True)
    along = torch.stack([(a * b).sum() for a, b in zip(g, d, strict=True) if a is not None]).sum()
    return -torch.autograd.grad(along, problem.lam)[0]


def meta_grad(problem: Plain, base_loss: Callable[[], Tensor], **options: Any) -> Tensor:
    return sk.meta_grad(
        base_loss, problem.meta_loss, base_params=problem.net, meta_params=[problem.lam], optimizer=None,
        adaptation="none", **{"alpha": 1e-4, **options},
    ).grads[0]  # fmt: skip


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_weights_from_gradients_of_the_inputs(gradient: Any) -> None:
    """Constants for autograd, but they move with theta+-."""
    problem = Plain()
    x = problem.x.clone().requires_grad_()

    def e(x: Tensor) -> Tensor:
        return (problem.net(x) - problem.y).square()

    source = "w = hold(gradient(e, x)).square().sum(1); return (lam.sigmoid() * w * e(x.detach())[:, 0]).mean()"
    names = {"gradient": gradient, "e": e, "x": x, "lam": problem.lam}
    plain, held = (fresh(source, hold=hold, **names) for hold in (lambda g: g, sk.stop_gradient))
    exact = expected(problem, held)
    assert relative_error(meta_grad(problem, plain, difference="exact"), exact) < 1e-10
    with pytest.warns(UserWarning, match="made by torch.autograd.grad without create_graph"):
        wrong = meta_grad(problem, plain)
    assert relative_error(wrong, exact) > 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert relative_error(meta_grad(problem, held), exact) < 1e-6


def test_gradients_with_a_graph_are_no_constants() -> None:
    """A gradient penalty is a part of the base gradient."""
    problem = Plain()
    x = problem.x.clone().requires_grad_()
    source = "return (lam * torch.autograd.grad(net(x).sum(), x, create_graph=True)[0].square().sum(1)).mean()"
    base_loss = fresh(source, lam=problem.lam, net=problem.net, x=x)
    exact = expected(problem, base_loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert relative_error(meta_grad(problem, base_loss), exact) < 1e-6
    assert relative_error(meta_grad(problem, base_loss, difference="exact"), exact) < 1e-10


DECAY = (
    "return lam.exp().mean() * sum(p.square().sum() for p in net.parameters() if p.requires_grad) + 0 * net(x).sum()"
)


def test_a_learned_decay_of_the_parameters_that_require_grad() -> None:
    """theta is frozen in the perturbed passes, so that the whole term is missing there."""
    problem = Plain()
    base_loss = fresh(DECAY, lam=problem.lam, net=problem.net, x=problem.x)
    exact = expected(problem, base_loss)
    assert relative_error(meta_grad(problem, base_loss, difference="exact"), exact) < 1e-10
    with pytest.warns(UserWarning, match="reads requires_grad of a base parameter"):
        assert not meta_grad(problem, base_loss).any()


def test_libraries_may_ask() -> None:
    """torch's attention looks at requires_grad of its weights to choose its path."""
    problem = Plain()
    problem.net = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double().eval()  # type: ignore[assignment]
    source = "return (lam.sigmoid() * net(x[:, None]).square().sum((1, 2))).mean()"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        got = meta_grad(problem, fresh(source, lam=problem.lam, net=problem.net, x=problem.x))
    assert got.any()
