"""Optimizers whose update is a sign: D = 0, a degenerate result, and one warning."""

from __future__ import annotations

import warnings

import pytest
import torch
from problems import meta_grad, weight_net
from stepping import differenced, stepped

from sama_kernels.adaptation import constant

SIGNS = [
    ("torch.optim", "Rprop"),
    ("lion_pytorch", "Lion"),
    ("lion_pytorch.cautious_lion", "Lion"),
    ("lion_pytorch.foreach", "Lion"),
    ("timm.optim.lion", "Lion"),
    ("bitsandbytes.optim", "Lion"),
    ("bitsandbytes.optim", "Lion8bit"),
]


@pytest.mark.parametrize(("module", "name"), SIGNS)
def test_updates_that_are_a_sign_have_no_derivative(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer_type = getattr(pytest.importorskip(module, exc_type=ImportError), name)
    monkeypatch.setattr(constant, "_warned", set())
    problem = weight_net(seed=12, dtype=torch.float32)
    optimizer = optimizer_type(problem.theta, lr=1e-3)
    for _ in range(3):
        problem.step(optimizer)
    message = r'optimizer: the update of \S+ is a sign.*`degenerate`; pass adaptation="none"'
    with pytest.warns(UserWarning, match=message):
        out = meta_grad(problem, optimizer)
    assert out.degenerate and out.norm == 0 and all((g == 0).all() for g in out.grads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        meta_grad(problem, optimizer)  # said once
        assert meta_grad(problem, optimizer, adaptation="none").norm > 0


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
@pytest.mark.parametrize(("module", "name"), [("torch.optim", "Rprop"), ("lion_pytorch", "Lion")])
def test_the_derivative_of_a_sign_is_zero_in_the_real_step_too(module: str, name: str, steps: int) -> None:
    optimizer_type = getattr(pytest.importorskip(module), name)
    params, _, before = stepped(optimizer_type, {"lr": 1e-3}, steps)
    expected = differenced(
        optimizer_type, {"lr": 1e-3}, before, [p.grad for p in params], [torch.ones_like(p) for p in params], h=1e-6
    )
    assert all((x.abs() < 1e-9).all() for x in expected)
