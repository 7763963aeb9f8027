"""`diagnose`: for every verdict a batch that deserves it, the cure that it names works, and nothing is changed."""

from __future__ import annotations

import inspect
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from guarded import Setting, assert_same
from problems import (
    Bilevel,
    after_steps,
    direct_gradient,
    flat,
    meta_grad,
    mixed_derivative,
    relative_error,
    weight_net,
)
from stepping import adapted
from torch import Tensor, nn

import sama_kernels as sk


def diagnose(problem: Bilevel, optimizer: Any = None, **options: Any) -> sk.Diagnosis:
    arguments = {"adaptation": "none"} if optimizer is None else {}
    return sk.diagnose(
        problem.base_loss, problem.meta_loss, base_params=problem.net, meta_params=problem.weigher,
        optimizer=optimizer, **{**arguments, **options},
    )  # fmt: skip


def text_and_json_agree(found: sk.Diagnosis) -> None:
    assert str(found).startswith(f"{found.verdict}: {found.words}")
    assert found.verdict == "fine" or (f"cure: {found.cure}" in str(found) and found.cure)
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert again["verdict"] == found.verdict and len(again["ladder"]) == len(found.ladder)


@pytest.mark.parametrize(
    ("dtype", "alpha"),
    [(torch.float64, 0.1), (torch.float64, 1e-6), (torch.float32, 0.1), (torch.float32, 1e-3), (torch.bfloat16, 0.3)],
)
@pytest.mark.parametrize("seed", range(3))
def test_fine(seed: int, dtype: torch.dtype, alpha: float) -> None:
    found = diagnose(weight_net(seed, dtype=dtype), alpha=alpha)
    assert found.verdict == "fine", str(found)
    assert found.reference == "forward mode" and not found.why_not and not found.detached
    assert found.suggested_alpha is None and found.alpha == pytest.approx(alpha)
    text_and_json_agree(found)


def test_figures_are_those_of_meta_grad_and_double_backward() -> None:
    problem = weight_net(seed=5)
    optimizer = after_steps(problem, 2)
    problem.base_loss()
    v, norm = adapted(optimizer, list(problem.theta), list(direct_gradient(problem)), "paper", "reference")
    exact = mixed_derivative(problem, tuple(v))
    found = diagnose(problem, optimizer, alpha=0.2)
    central, forward, half = (
        meta_grad(problem, optimizer, alpha=alpha, difference=how)
        for how, alpha in (("central", 0.2), ("forward", 0.2), ("central", 0.1))
    )
    assert found.error == pytest.approx(relative_error(flat(central.grads), exact), rel=1e-6)
    assert found.error_forward == pytest.approx(relative_error(flat(forward.grads), exact), rel=1e-6)
    rungs = {round(math.log2(rung.alpha / 0.2)): rung for rung in found.ladder}
    assert {-1, 0} <= set(rungs) and [r.alpha for r in found.ladder] == sorted(r.alpha for r in found.ladder)
    assert rungs[-1].error == pytest.approx(relative_error(flat(half.grads), exact), rel=1e-6)
    assert rungs[0].change == pytest.approx(relative_error(flat(central.grads), flat(half.grads)), rel=1e-6)
    assert found.norm == pytest.approx(float(norm)) and found.theta_norm == pytest.approx(
        float(flat(problem.theta).norm())
    )
    loss = float(problem.base_loss())
    assert found.base_loss == pytest.approx(loss)
    assert found.change_plus == pytest.approx(float(central.base_loss_plus) - loss, rel=1e-9)
    assert found.change_minus == pytest.approx(float(central.base_loss_minus) - loss, rel=1e-9)
    shares = {
        name: float(x.square().sum() / norm**2) for (name, _), x in zip(problem.net.named_parameters(), v, strict=True)
    }
    assert dict(found.largest) == pytest.approx(shares)
    problem.base_loss()
    g = flat(torch.autograd.grad(problem.base_loss(), problem.lam))
    agree = -math.log10(float(2 * central.epsilon * flat(central.grads).norm() / g.norm()))
    assert found.agreeing_digits == pytest.approx(agree, rel=1e-6) and found.of_digits == pytest.approx(15.65, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("alpha", [3.0, 100.0, sk.relative(2.0)])
def test_alpha_too_large(alpha: Any, dtype: torch.dtype) -> None:
    problem = weight_net(1, dtype=dtype)
    found = diagnose(problem, alpha=alpha)
    assert found.verdict == "alpha too large", str(found)
    assert found.error > 0.5 and found.suggested_alpha < found.alpha
    text_and_json_agree(found)
    assert f"{found.suggested_alpha:.2g}" in found.cure
    better = diagnose(problem, alpha=found.suggested_alpha)
    assert better.verdict == "fine" and better.error <= 0.02


@pytest.mark.parametrize(("dtype", "alpha"), [(torch.float32, 1e-8), (torch.float32, 1e-14), (torch.float64, 1e-16)])
def test_alpha_too_small(dtype: torch.dtype, alpha: float) -> None:
    """Also where theta does not move at all."""
    problem = weight_net(1, dtype=dtype)
    found = diagnose(problem, alpha=alpha)
    assert found.verdict == "alpha too small", str(found)
    assert found.suggested_alpha > found.alpha
    text_and_json_agree(found)
    better = diagnose(problem, alpha=found.suggested_alpha)
    assert better.verdict == "fine" and better.error <= 0.02


@pytest.mark.parametrize(("dtype", "alpha"), [(torch.bfloat16, 1e-3), (torch.bfloat16, 1e-8), (torch.float16, 1e-5)])
def test_alpha_too_small_for_16_bits(dtype: torch.dtype, alpha: float) -> None:
    found = diagnose(weight_net(1, dtype=dtype), alpha=alpha)
    assert found.verdict == "alpha too small" and "rounding to 16 bits" in found.words, str(found)
    assert found.realised < 0.9 and 'rounding="stochastic"' in found.cure
    text_and_json_agree(found)


def test_precision_where_no_alpha_helps() -> None:
    """lambda gradients of 1e4 whose dependence on theta is 1e-3: float32 keeps one digit of the difference."""
    torch.manual_seed(0)
    w, lam = torch.randn(8).requires_grad_(), torch.rand(8).requires_grad_()
    options: dict[str, Any] = {"base_params": [w], "meta_params": [lam], "optimizer": None, "adaptation": "none"}
    base = lambda: (lam * (1e4 + 1e-3 * torch.sin(30 * w))).sum()  # noqa: E731
    found = sk.diagnose(base, lambda: w.square().sum(), alpha=0.01, **options)
    assert found.verdict == "precision" and 'difference="exact"' in found.cure, str(found)
    text_and_json_agree(found)


def first_step(problem: Bilevel) -> Any:
    return after_steps(problem, 2, steps=1)


def not_finite(problem: Bilevel) -> Any:
    original = problem.meta_loss
    problem.meta_loss = lambda: math.nan * original()
    return after_steps(problem, 2)


def unread(problem: Bilevel) -> Any:
    original = problem.meta_loss
    problem.meta_loss = lambda: 0 * original()
    return after_steps(problem, 2)


@pytest.mark.parametrize(
    ("make", "words"), [(first_step, "first step"), (not_finite, "not finite"), (unread, "no gradient")]
)
def test_degenerate(make: Any, words: str) -> None:
    problem = weight_net(2)
    found = diagnose(problem, make(problem), alpha=0.01)
    assert found.verdict == "degenerate" and words in found.words and not found.ladder
    text_and_json_agree(found)


def test_degenerate_because_of_theta_or_lambda() -> None:
    w, lam = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    options: dict[str, Any] = {"base_params": [w], "meta_params": [lam], "optimizer": None, "adaptation": "none"}
    found = sk.diagnose(lambda: (lam * w).sum(), lambda: w.sum(), alpha=sk.relative(1e-3), **options)
    assert found.verdict == "degenerate" and "alpha is relative" in found.words
    found = sk.diagnose(lambda: lam.exp().sum() + w.cos().sum(), lambda: w.sum(), alpha=1e-3, **options)
    assert found.verdict == "degenerate" and "does not change along v" in found.words


@pytest.mark.parametrize("alpha", [1e-3, 1.0])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore:sama_kernels. base_loss")
def test_plain_detach(seed: int, alpha: float) -> None:
    for _ in range(2):  # the warning is given once, the verdict always
        found = diagnose(weight_net(seed, hold="detach"), alpha=alpha)
        assert found.verdict == "plain detach" and found.detached, str(found)
        assert "stop_gradient" in found.cure
        text_and_json_agree(found)


def test_something_that_moves_without_a_gradient() -> None:
    """A value that passes through Python numbers: no watch can see it, but every difference disagrees with forward
    mode while they agree with each other."""
    problem = weight_net(6)
    net, weigher = problem.net, problem.weigher
    x, y = torch.randn(24, 5, dtype=torch.float64), torch.randn(24, 1, dtype=torch.float64)

    def base() -> Tensor:
        losses = (net(x) - y).square()
        return (weigher(losses.new_tensor(losses.tolist())) * losses).mean()

    problem.base_loss = base
    found = diagnose(problem, alpha=1e-3)
    assert found.verdict == "plain detach" and not found.detached and ".item()" in found.words


@pytest.mark.filterwarnings("ignore:sama_kernels. base_loss")
def test_a_harmless_detach_is_fine() -> None:
    problem = weight_net(7)
    inner = problem.base_loss
    problem.base_loss = lambda: (
        inner() + 1e-9 * (problem.lam[0].sum() * problem.net(torch.ones(1, 5).double()).detach()).sum()
    )
    found = diagnose(problem, alpha=1e-3)
    assert found.detached and found.verdict == "fine"


def test_untouched_cells() -> None:
    """Adam's D is lr / eps where a row never had a gradient: under "exact" such rows are all of v."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 1)).double()
    lam = torch.rand(16, dtype=torch.float64, requires_grad=True)
    rows, meta_rows = torch.randint(0, 25, (16,)), torch.randint(0, 50, (16,))
    base = lambda: (lam * net(rows).squeeze(1).square()).mean()  # noqa: E731
    meta = lambda: (net(meta_rows) - 1).square().mean()  # noqa: E731
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        base().backward()
        optimizer.step()
    options: dict[str, Any] = {"base_params": net, "meta_params": [lam], "optimizer": optimizer, "alpha": 1e-3}
    found = sk.diagnose(base, meta, adaptation="exact", **options)
    assert found.verdict == "untouched cells" and found.untouched > 0.9 and found.largest[0][0] == "0.weight"
    text_and_json_agree(found)
    found = sk.diagnose(base, meta, adaptation="paper", **options)
    assert found.verdict == "fine" and found.untouched == 0


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(("alpha", "verdict"), [(1e-2, "fine"), (3.0, "alpha too large")])
def test_double_backward_where_forward_mode_is_missing(alpha: float, verdict: str, recorded: bool) -> None:
    problem = weight_net(8, recorded=recorded)
    inner = problem.base_loss
    problem.base_loss = lambda: NoForwardMode.apply(inner()) / 2
    reference = diagnose(weight_net(8), alpha=alpha)
    found = diagnose(problem, alpha=alpha)
    assert found.reference == "double backward" and "NoForwardMode" in found.why_not["forward mode"]
    assert found.verdict == verdict and found.error == pytest.approx(reference.error, rel=1e-6)
    text_and_json_agree(found)


@pytest.mark.parametrize(("alpha", "verdict"), [(1e-3, "fine"), (30.0, "alpha too large"), (1e-17, "alpha too small")])
def test_extrapolation_where_neither_is_possible(alpha: float, verdict: str) -> None:
    """Fused attention on the CPU has neither forward mode nor a second derivative."""
    torch.manual_seed(0)
    net = nn.Linear(6, 6).double()
    lam = torch.rand(8, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 2, 8, 6, dtype=torch.float64)

    def losses() -> Tensor:
        y = net(x)
        return F.scaled_dot_product_attention(y, y, y).square().mean((0, 1, 3))

    options: dict[str, Any] = {"base_params": net, "meta_params": [lam], "optimizer": None, "adaptation": "none"}
    base, meta = (lambda: (lam * losses()).sum()), (lambda: net(x).square().mean())
    found = sk.diagnose(base, meta, alpha=alpha, **options)
    assert found.reference == "extrapolation" and set(found.why_not) == {"forward mode", "double backward"}
    assert found.verdict == verdict, str(found)
    text_and_json_agree(found)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        known = sk.diagnose(base, meta, alpha=alpha, **options)
    assert known.reference == "forward mode" and found.error == pytest.approx(known.error, rel=1e-2, abs=1e-8)


@pytest.mark.filterwarnings("ignore:sama_kernels. base_loss")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_everything_is_left_as_it_was(dtype: torch.dtype) -> None:
    setting = Setting(dtype)
    before = setting.state()
    arguments: dict[str, Any] = {
        "base_params": setting.net,
        "meta_params": [setting.weights],
        "optimizer": setting.optimizer,
    }
    found = sk.diagnose(
        setting.base_loss, setting.meta_loss, alpha=0.1, update_base=True, difference="forward", **arguments
    )
    assert found.verdict and found.ladder
    assert_same(before, setting.state())
    setting.net[3].forward = lambda x: NoForwardMode.apply(x) / 2  # type: ignore[union-attr]
    assert sk.diagnose(setting.base_loss, setting.meta_loss, **arguments).reference == "double backward"
    assert_same(before, setting.state())
    assert all(p.requires_grad for p in setting.net.parameters())


def test_arguments_are_those_of_meta_grad() -> None:
    assert list(inspect.signature(sk.diagnose).parameters) == list(inspect.signature(sk.meta_grad).parameters)
    problem = weight_net(9)
    plain = diagnose(problem, alpha=0.1)
    once = sk.diagnose(
        [problem.base_loss], problem.meta_loss, base_params=iter(problem.theta), meta_params=iter(problem.lam),
        optimizer=None, adaptation="none", alpha=0.1, backend="reference", hold="center",
    )  # fmt: skip
    assert once.error == pytest.approx(plain.error, rel=1e-6) and once.largest[0][0].startswith("tensor ")
    with pytest.raises(ValueError, match="alpha: must be positive"):
        diagnose(problem, alpha=-1)


def test_an_explicit_meta_gradient_does_not_count() -> None:
    problem = weight_net(10)
    plain = diagnose(problem, alpha=0.3)
    original = problem.meta_loss
    problem.meta_loss = lambda: original() + (problem.lam[0] ** 3).sum()
    assert diagnose(problem, alpha=0.3).error == pytest.approx(plain.error, rel=1e-6)
