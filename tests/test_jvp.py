"""What has no forward-mode derivative is one error that names it; what has one is differentiated through."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import (
    Bilevel,
    direct_gradient,
    flat,
    meta_grad,
    mixed_derivative,
    relative_error,
    same_bits,
    snapshot,
    weight_net,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sama_kernels as sk


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class DoubledBothWays(Doubled):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * tangent


class ReadsTheta(torch.autograd.Function):
    """Reads a module otherwise than as an argument, and is written in the newer style, without ctx in forward."""

    @staticmethod
    def forward(x: Tensor, net: nn.Module) -> Tensor:
        return net(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.zeros(8, 5, dtype=grad.dtype), None


class ReadsThetaDecorated(ReadsTheta):
    setup_context = torch.autograd.Function.setup_context

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: Tensor, net: nn.Module) -> Tensor:  # type: ignore[override]
        return net(x)


def unsupported(setting: Bilevel, name: str) -> Tensor:
    net = setting.net
    x = torch.ones(8, 5, dtype=torch.float64)
    if name == "Doubled":
        return Doubled.apply(net(x))
    if name == "CheckpointFunction":  # reads theta, but not as an argument; the input has no tangent
        return checkpoint(net, x.requires_grad_(), use_reentrant=True)
    if name.startswith("ReadsTheta"):
        return {"ReadsTheta": ReadsTheta, "ReadsThetaDecorated": ReadsThetaDecorated}[name].apply(
            x.requires_grad_(), net
        )
    query = (net(x) + torch.randn(8, 8, dtype=torch.float64)).reshape(1, 1, 8, 8)
    return F.scaled_dot_product_attention(query, query, query)[0, 0, :, :1]


@pytest.mark.parametrize(
    "name",
    [
        "_scaled_dot_product_flash_attention_for_cpu",
        "Doubled",
        "CheckpointFunction",
        "ReadsTheta",
        "ReadsThetaDecorated",
    ],
)
def test_operators_without_forward_mode_are_named(name: str) -> None:
    problem = weight_net(seed=37)
    problem.base_loss = lambda: (problem.weigher(torch.ones(8, 1).double()) * unsupported(problem, name)).mean()
    before = snapshot((*problem.theta, *problem.lam))
    versions = [p._version for p in problem.theta]
    with pytest.raises(NotImplementedError) as raised:
        meta_grad(problem, None, adaptation="none", difference="exact")
    message = str(raised.value)
    assert re.match(rf'difference: "exact" needs forward-mode .* torch has none for the .*\b{name}\b', message)
    assert 'difference="central"' in message and 'attn_implementation="eager"' in message and "\n" not in message
    assert all(same_bits(p, q) for p, q in zip((*problem.theta, *problem.lam), before, strict=True))
    assert [p._version for p in problem.theta] == versions and all(p.requires_grad for p in problem.theta)
    assert meta_grad(problem, None, adaptation="none").grads[0].norm() > 0  # the alternative works


def test_other_errors_pass_through() -> None:
    problem = weight_net(seed=38)

    def broken() -> Tensor:
        raise NotImplementedError("mine")

    problem.base_loss = broken
    with pytest.raises(NotImplementedError, match=r"^mine$"):
        meta_grad(problem, None, adaptation="none", difference="exact")


def test_functions_with_jvp_and_checkpoints_without_reentry() -> None:
    problem = weight_net(seed=39)
    inner, x = problem.net, torch.randn(8, 5, dtype=torch.float64)

    def base() -> Tensor:
        out = DoubledBothWays.apply(checkpoint(inner, x, use_reentrant=False)).square()
        return (problem.weigher(sk.stop_gradient(out)) * out).mean()

    problem.base_loss = base
    expected = mixed_derivative(problem, direct_gradient(problem))
    out = meta_grad(problem, None, adaptation="none", difference="exact")
    assert relative_error(flat(out.grads), expected) < 1e-12


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.LeakyReLU(), nn.ELU()], ids=str
)
def test_activations_of_a_weight_net(activation: nn.Module) -> None:
    """The backward pass of the weight net runs in forward mode too."""
    problem = weight_net(seed=40)
    problem.weigher[1] = activation  # type: ignore[operator]
    problem.base_loss()
    expected = mixed_derivative(problem, direct_gradient(problem))
    out = meta_grad(problem, None, adaptation="none", difference="exact")
    assert relative_error(flat(out.grads), expected) < 1e-12


def test_an_activation_whose_backward_has_no_forward_mode_is_named() -> None:
    problem = weight_net(seed=41)
    problem.weigher[1] = nn.SiLU()  # type: ignore[operator]
    with pytest.raises(NotImplementedError, match=r"the operator aten::silu_backward"):
        meta_grad(problem, None, adaptation="none", difference="exact")
    problem.net[1] = nn.SiLU()  # type: ignore[operator]
    problem.weigher[1] = nn.Tanh()  # type: ignore[operator]
    problem.base_loss()
    expected = mixed_derivative(problem, direct_gradient(problem))
    out = meta_grad(problem, None, adaptation="none", difference="exact")  # in the base net there is no backward pass
    assert relative_error(flat(out.grads), expected) < 1e-12


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("what", ["net", "loss"])
def test_compiled_parts_run_eagerly(what: str, backend: str) -> None:
    """What torch.compile makes has no forward mode, and some of it loses tangents without an error."""
    problem = weight_net(seed=42)
    net, weigher, x = problem.net, problem.weigher, torch.randn(24, 5, dtype=torch.float64)
    compiled_net = torch.compile(net, backend=backend) if what == "net" else net

    def loss() -> Tensor:
        losses = compiled_net(x).square()
        return (weigher(losses.detach()) * losses).mean()

    def eager() -> Tensor:
        losses = net(x).square()
        return (weigher(losses.detach()) * losses).mean()

    problem.base_loss = eager
    expected = mixed_derivative(problem, direct_gradient(problem))
    problem.base_loss = torch.compile(loss, backend=backend) if what == "loss" else loss
    for _ in range(2):
        problem.base_loss().backward()
    out = meta_grad(problem, None, adaptation="none", difference="exact")
    assert relative_error(flat(out.grads), expected) < 1e-12
    counted = torch._dynamo.utils.counters["stats"]["calls_captured"]
    problem.base_loss().backward()  # compiled as before
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] == counted > 0
