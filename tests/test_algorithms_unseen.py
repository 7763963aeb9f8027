"""What second-order algorithms would not see, or would leave out, is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain import Plain
from problems import OPTIMIZERS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sama_kernels as sk
from sama_kernels.algorithms import BOME, F2SA, T1T2, Iterative, Neumann, Truncated


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"clip_coef": 0.5}, NotImplementedError, "clip_coef, clip_value: the steps of Iterative are not clipped"),
        ({"clip_value": 0.5}, NotImplementedError, "clip_coef, clip_value: the steps of Iterative are not clipped"),
        ({"optimizer": None, "adaptation": "none"}, ValueError, "optimizer: Iterative makes steps of the base"),
        ({"hook": True}, NotImplementedError, "the step hooks of this SGD know the optimizer alone"),
        ({"part": True}, ValueError, "base_params: .* the optimizer trains 2 parameters that are not among them"),
    ],
    ids=["norm", "value", "no optimizer", "hook", "part"],
)
def test_what_iterative_would_leave_out_is_an_error(options: dict[str, Any], error: Any, words: str) -> None:
    problem = Plain()
    optimizer, _ = problem.trained(OPTIMIZERS[0])
    options = dict(options)
    if options.pop("hook", False):
        optimizer.register_step_post_hook(lambda *_: None)
    net = problem.net[0] if options.pop("part", False) else problem.net
    before = [p.detach().clone() for p in problem.theta]
    with pytest.raises(error, match=words):
        sk.meta_grad(
            problem.base_loss, problem.meta_loss, base_params=net, meta_params=[problem.lam],
            algorithm=Iterative(advance=True), **{"optimizer": optimizer, **options},
        )  # fmt: skip
    assert all(map(torch.equal, problem.theta, before))


def test_master_params_are_refused_by_iterative() -> None:
    problem = Plain(torch.bfloat16)
    masters = [p.detach().float().requires_grad_() for p in problem.theta]
    for m in masters:
        m.grad = torch.randn_like(m)
    optimizer = torch.optim.SGD(masters, lr=0.1)
    optimizer.step()
    with pytest.raises(NotImplementedError, match="master_params: Iterative steps base_params themselves"):
        problem.meta_step(optimizer, "iterative", master_params=masters)


ALGORITHMS = [T1T2(), Neumann(terms=2), Truncated(steps=2), Iterative(steps=2), Iterative(steps=2, checkpoint=True)]


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, F2SA, BOME])
def test_reentrant_checkpointing_is_an_error(algorithm: Any) -> None:
    """Its parameters are not in the graph: the second layer here was left out without a word."""
    problem = Plain()

    def base_loss() -> Tensor:
        hidden = problem.net[1](problem.net[0](problem.x))
        out = checkpoint(problem.net[2], hidden, use_reentrant=True)
        return (problem.lam.sigmoid()[:, None] * (out - problem.y).square()).mean()

    with pytest.raises(ValueError, match="base_loss: it uses reentrant checkpointing"):
        _step(problem, algorithm, base_loss)


def _step(problem: Plain, algorithm: Any, base_loss: Callable[[], Tensor]) -> Any:
    if isinstance(algorithm, type):
        solver = algorithm(problem.net, [problem.lam], lr=0.1, inner_lr=0.1)
        return solver.step(base_loss, problem.meta_loss)
    optimizer, _ = problem.trained(OPTIMIZERS[0])
    return problem.meta_step(optimizer, algorithm, base_loss=base_loss)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_function_that_can_be_differentiated_once_is_an_error(algorithm: Any) -> None:
    problem = Plain()

    def base_loss() -> Tensor:
        out = problem.net[2](Once.apply(problem.net[0](problem.x)))
        return (problem.lam.sigmoid()[:, None] * (out - problem.y).square()).mean()

    with pytest.raises(NotImplementedError, match=r"an autograd\.Function of it is once_differentiable"):
        _step(problem, algorithm, base_loss)


@pytest.mark.parametrize("algorithm", [Iterative(steps=2), Iterative(steps=1, checkpoint=True), F2SA, BOME])
def test_theta_read_outside_its_module_is_an_error(algorithm: Any) -> None:
    """A list of the parameters made before the steps has theta of before them."""
    problem = Plain()
    listed = list(problem.net.parameters())

    def base_loss() -> Tensor:
        return problem.base_loss() + sum((p.square().sum() for p in listed), torch.zeros(())) * problem.lam.sum()

    with pytest.raises(ValueError, match=r"base_loss: it reads base parameter \d .* otherwise than through its module"):
        _step(problem, algorithm, base_loss)
