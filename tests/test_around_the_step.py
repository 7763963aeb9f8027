"""What happens between the base step and the meta step, and around it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from plain import Plain
from problems import relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrize

import sama_kernels as sk


@pytest.mark.parametrize("change", ["clear", "scale"])
def test_a_hook_after_the_step_that_changes_the_gradients(change: str) -> None:
    """It runs before the hook that notes which tensors stand in .grad, and yet they are not those of the step."""
    problem = Plain()
    optimizer = torch.optim.Adam(problem.theta, lr=0.01)

    def hook(optimizer: Any, *_: Any) -> None:
        if change == "clear":
            optimizer.zero_grad(set_to_none=False)
        else:
            for p in problem.theta:
                assert p.grad is not None
                p.grad.mul_(0.1)

    handle = optimizer.register_step_post_hook(hook)
    for _ in range(2):
        problem.base_loss().backward()
        optimizer.step()
    with pytest.raises(ValueError, match=r"the .grad of tensor 0 .* was changed or replaced after the"):
        problem.meta_step(optimizer, "sama")
    handle.remove()
    problem.base_loss().backward()
    optimizer.step()
    assert not problem.meta_step(optimizer, "sama").degenerate


def test_a_hook_after_the_step_that_looks_only() -> None:
    problem, seen = Plain(), []
    optimizer = torch.optim.Adam(problem.theta, lr=0.01)
    optimizer.register_step_post_hook(lambda *_: seen.append(float(problem.theta[0].grad.norm())))  # type: ignore[union-attr]
    for _ in range(3):
        optimizer.zero_grad()
        problem.base_loss().backward()
        optimizer.step()
    assert len(seen) == 3 and not problem.meta_step(optimizer, "sama").degenerate


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adamax])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_theta_that_was_moved_after_a_step_with_coupled_decay(kind: Any, decay: float) -> None:
    """D takes theta before the step there, which is solved from what theta is now."""
    problem = Plain()
    optimizer = kind(problem.theta, lr=0.05, weight_decay=decay)
    for _ in range(2):
        optimizer.zero_grad()
        problem.base_loss().backward()
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(2):  # a meta step itself is no such move
            problem.meta_step(optimizer, "sama")
    with torch.no_grad():
        problem.theta[2].clamp_(-0.1, 0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        problem.meta_step(optimizer, "sama")
    assert any("written after the optimizer's last step" in str(w.message) for w in caught) == (decay > 0)


def test_lambda_in_the_memory_of_theta_is_an_error() -> None:
    problem = Plain()
    lam = nn.Parameter(problem.net[2].weight.detach()[:, :3])
    with pytest.raises(ValueError, match=r"meta_params: tensor 0 \(shape \(1, 3\)\) lies in the memory of a base"):
        sk.meta_grad(
            lambda: (lam.sum() * problem.net(problem.x)).mean(), problem.meta_loss, base_params=problem.net,
            meta_params=[lam], optimizer=None, adaptation="none",
        )  # fmt: skip


@pytest.mark.parametrize("difference", ["central", "exact"])
def test_a_cache_of_parametrized_weights_around_the_meta_step_is_an_error(difference: str) -> None:
    problem = Plain()
    parametrize.register_parametrization(problem.net[0], "weight", nn.Tanh())

    def step() -> Tensor:
        return sk.meta_grad(
            problem.base_loss, problem.meta_loss, base_params=problem.net, meta_params=[problem.lam], optimizer=None,
            adaptation="none", alpha=1e-4, difference=difference,
        ).grads[0]  # fmt: skip

    expected, plain = step(), problem.base_loss

    def cached() -> Tensor:
        with parametrize.cached():
            return plain()

    with parametrize.cached(), pytest.raises(RuntimeError, match=r"parametrize.cached\(\) is on"):
        step()
    problem.base_loss = cached  # type: ignore[method-assign]
    assert relative_error(step(), expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sama_loss_times_the_scale_of_a_grad_scaler(dtype: torch.dtype) -> None:
    """65536 is infinite in float16, but not the gradient times it."""
    theta = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    lam = torch.tensor([0.3, -0.2, 0.1], dtype=dtype, requires_grad=True)
    arguments: dict[str, Any] = {
        "base_params": [theta], "meta_params": [lam], "optimizer": None, "adaptation": "none", "alpha": 1e-2,
    }  # fmt: skip

    def losses() -> tuple[Any, Any]:
        return lambda: (lam.float().sigmoid() * theta.square()).sum() / 1000, lambda: theta.square().sum()

    grads = sk.meta_grad(*losses(), **arguments).grads[0].float()
    (sk.sama_loss(*losses(), **arguments) * 65536).backward()
    assert lam.grad is not None and lam.grad.isfinite().all()
    torch.testing.assert_close(lam.grad.float(), grads * 65536, rtol=torch.finfo(dtype).eps * 2, atol=0)
