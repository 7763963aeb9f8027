"""Activations that backward computes again (non-reentrant checkpointing) are those of the pass, held values too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Bilevel, flat, relative_error, same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sama_kernels as sk
from sama_kernels.algorithms import Iterative

# torch 2.11 saves a region's inputs by an autograd.Function without forward mode: an error that names it.
FORWARD_MODE = not hasattr(torch.utils.checkpoint, "_NoopSaveInputs")


def again(function: Callable[..., Tensor], *args: Any) -> Tensor:
    result: Tensor = checkpoint(function, *args, use_reentrant=False)
    return result


def weighted(seed: int, region: Callable[..., Tensor], calls: int = 1) -> Bilevel:
    """Meta-Weight-Net whose weighting, with its `stop_gradient`, goes through `region`."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    weigher = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1), nn.Sigmoid()).double()
    x, y, x_meta, y_meta = (torch.randn(12, k, dtype=torch.float64) for k in (4, 1, 4, 1))

    def weighting(losses: Tensor) -> Tensor:
        for _ in range(calls):
            losses = weigher(sk.stop_gradient(losses)) * losses
        return losses.mean()

    def base_loss() -> Tensor:
        return region(weighting, (net(x) - y).square())

    return Bilevel(net, weigher, base_loss, lambda: (net(x_meta) - y_meta).square().mean())


def plainly(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args)


def meta_gradient(problem: Bilevel, recorded: bool, microbatches: int = 1, **options: Any) -> Tensor:
    base_loss = sk.recorded(problem.base_loss) if recorded else problem.base_loss
    optimizer = torch.optim.SGD(problem.theta, lr=0.1)
    torch.manual_seed(0)
    base_loss().backward()
    optimizer.step()
    problem.weigher.zero_grad()
    if recorded:
        base_loss()  # values at today's theta
    out = sk.meta_grad(
        [base_loss] * microbatches, problem.meta_loss, base_params=problem.net, meta_params=problem.weigher,
        optimizer=optimizer, **{"alpha": 0.5, **options},
    )  # fmt: skip
    return flat(out.grads)


@pytest.mark.parametrize("difference", ["central", "forward", "exact"])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_held_value_inside_a_checkpointed_region(difference: str, recorded: bool, microbatches: int) -> None:
    if difference == "exact" and not FORWARD_MODE:
        pytest.skip("checkpointing without forward mode")
    plain, checkpointed = (
        meta_gradient(weighted(1, region), recorded, microbatches, difference=difference) for region in (plainly, again)
    )
    assert plain.norm() > 1e-4 and relative_error(checkpointed, plain) < 1e-12


@pytest.mark.parametrize("recorded", [False, True])
def test_several_held_values_inside_are_an_error(recorded: bool) -> None:
    problem = weighted(2, again, calls=2)
    with pytest.raises(RuntimeError, match=r"calls it 2 times.*outside torch\.utils\.checkpoint"):
        meta_gradient(problem, recorded)
    if FORWARD_MODE:
        plain = meta_gradient(weighted(2, plainly, calls=2), recorded, difference="exact")
        assert relative_error(meta_gradient(weighted(2, again, calls=2), recorded, difference="exact"), plain) < 1e-12


def test_several_held_values_outside_are_told_apart() -> None:
    def split(function: Callable[..., Tensor], losses: Tensor) -> Tensor:
        return function(again(torch.sin, losses))

    assert meta_gradient(weighted(3, split, calls=2), False).norm() > 0


def test_theta_comes_back_after_an_error_in_backward() -> None:
    problem = weighted(4, again, calls=2)
    optimizer = torch.optim.SGD(problem.theta, lr=0.1)
    problem.base_loss().backward()
    optimizer.step()
    before, grads = [p.detach().clone() for p in problem.theta], [p.grad.clone() for p in problem.theta]
    with pytest.raises(RuntimeError, match="stop_gradient"):
        sk.meta_grad(
            problem.base_loss, problem.meta_loss, base_params=problem.net, meta_params=problem.weigher,
            optimizer=optimizer,
        )  # fmt: skip
    assert all(map(same_bits, problem.theta, before))
    assert all(same_bits(p.grad, g) and p.requires_grad for p, g in zip(problem.theta, grads, strict=True))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("in_region", ["model", "weighting"])
def test_iterative_goes_back_step_by_step_through_a_checkpointed_model(steps: int, in_region: str) -> None:
    """Each step's activations need that step's parameters: the model's own gave errors of 3 %, silently."""

    def problem(region: Callable[..., Tensor]) -> Bilevel:
        made = weighted(5, region if in_region == "weighting" else plainly)
        made.weigher[2].p = 0.0
        if in_region == "model" and region is again:
            made.net.forward = lambda x: again(nn.Sequential.forward, made.net, x)  # type: ignore[method-assign]
        return made

    plain = meta_gradient(problem(plainly), False, algorithm=Iterative(steps=steps))
    back = meta_gradient(problem(again), False, algorithm=Iterative(steps=steps, checkpoint=True))
    assert relative_error(back, plain) < 1e-12
    if in_region == "weighting":  # which reads no theta
        assert relative_error(meta_gradient(problem(again), False, algorithm=Iterative(steps=steps)), plain) < 1e-12
    else:
        failing = problem(again)
        parameters = list(failing.theta)
        with pytest.raises(NotImplementedError, match=r"Iterative\(\.\.\., checkpoint=True\)"):
            meta_gradient(failing, False, algorithm=Iterative(steps=steps))
        assert all(a is b for a, b in zip(failing.net.parameters(), parameters, strict=True))


def test_attention_that_is_computed_again_is_that_of_training() -> None:
    """In eval mode with a padding mask torch's attention has a fast path, which zeroes padded positions."""

    def gradient(region: Callable[..., Tensor]) -> Tensor:
        torch.manual_seed(6)
        layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 1).double().eval()
        head = nn.Linear(8, 1).double()
        x, prompt = torch.randn(3, 5, 8).double(), torch.randn(8).double().requires_grad_()
        padding = torch.zeros(3, 5, dtype=torch.bool)
        padding[:, 3:] = True

        def loss() -> Tensor:
            return head(region(lambda z: (layer(z, src_key_padding_mask=padding) * prompt).tanh(), x)).square().mean()

        theta = [*layer.parameters(), *head.parameters()]
        optimizer = torch.optim.SGD(theta, lr=0.1)
        loss().backward()
        optimizer.step()
        out = sk.meta_grad(
            loss, lambda: head(layer(x)).sin().mean(), base_params=theta, meta_params=[prompt], optimizer=optimizer,
            alpha=1e-3,
        )  # fmt: skip
        return out.grads[0]

    assert relative_error(gradient(again), gradient(plainly)) < 1e-12
