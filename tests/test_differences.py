"""difference="central", "forward", "exact" against exact double backward, and what each of them does to theta."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import (
    OPTIMIZERS,
    Bilevel,
    after_steps,
    direct_gradient,
    flat,
    meta_grad,
    mixed_derivative,
    relative_error,
    same_bits,
    snapshot,
    weight_net,
)
from stepping import adapted
from torch import Tensor, nn

import sama_kernels as sk

ORDER = {"central": 2, "forward": 1}


def exact_answer(problem: Bilevel, optimizer: Any, adaptation: str = "paper") -> Tensor:
    """-d/dlambda <dL_base/dtheta, v>, with v through the reference ops."""
    d = list(direct_gradient(problem))
    v = d if optimizer is None else adapted(optimizer, list(problem.theta), d, adaptation, "reference")[0]
    problem.base_loss()  # the tape of hold="auto" then holds values at today's theta
    return mixed_derivative(problem, tuple(v))


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("hold", ["auto", "center"])
@pytest.mark.parametrize("case", range(len(OPTIMIZERS)))
def test_exact_is_double_backward(case: int, hold: str, recorded: bool) -> None:
    problem = weight_net(seed=case, recorded=recorded)
    optimizer = after_steps(problem, case)
    expected = exact_answer(problem, optimizer)
    out = meta_grad(problem, optimizer, difference="exact", hold=hold, alpha=7.0)
    assert relative_error(flat(out.grads), expected) < 1e-12
    torch.testing.assert_close(out.epsilon, 7.0 / out.norm)
    assert out.base_loss_plus == out.base_loss_minus == problem.base_loss()
    assert out.realised is None and out.alignment is None and not out.degenerate


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("case", range(len(OPTIMIZERS)))
def test_order_of_the_error_in_alpha(case: int, difference: str, recorded: bool) -> None:
    problem = weight_net(seed=20 + case, recorded=recorded)
    optimizer = after_steps(problem, case)
    expected = exact_answer(problem, optimizer)
    errors = [
        relative_error(flat(meta_grad(problem, optimizer, difference=difference, alpha=alpha).grads), expected)
        for alpha in (2e-3, 1e-3)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDER[difference], abs=0.03)
    assert errors[1] < {"central": 2e-5, "forward": 2e-2}[difference]


@pytest.mark.parametrize("difference", ["forward", "exact"])
def test_held_values_of_an_earlier_call_are_used_as_in_the_central_difference(difference: str) -> None:
    """With hold="auto" the tape has the values before the base step, with "center" those after it."""
    problem = weight_net(seed=30)
    optimizer = torch.optim.SGD(problem.theta, lr=0.5)
    problem.base_loss()
    problem.step(optimizer)
    options = {"adaptation": "none", "alpha": 1e-6}
    got, central = (
        [flat(meta_grad(problem, None, difference=how, hold=hold, **options).grads) for hold in ("auto", "center")]
        for how in (difference, "central")
    )
    for a, b in zip(got, central, strict=True):
        assert relative_error(a, b) < 1e-4
    assert relative_error(got[0], got[1]) > 1e-3


@pytest.mark.parametrize(("difference", "expected"), [("central", 3), ("forward", 2), ("exact", 1)])
def test_passes_without_a_tape(difference: str, expected: int) -> None:
    problem = weight_net(seed=31, recorded=False)
    inner, calls = problem.base_loss, []

    def counting() -> Tensor:
        calls.append(flat(problem.theta))
        return inner()

    problem.base_loss = counting
    before = flat(problem.theta)
    meta_grad(problem, None, adaptation="none")  # the first central difference may find out that values are asked for
    del calls[:]
    meta_grad(problem, None, adaptation="none", difference=difference, alpha=0.1)
    assert len(calls) == expected
    distances = sorted(float((theta - before).norm()) for theta in calls)
    moved = {"central": [0, 0.1, 0.1], "forward": [0, 0.1], "exact": [0]}[difference]
    assert distances == pytest.approx(moved, rel=1e-9)


@pytest.mark.parametrize("difference", ["forward", "exact"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_update_base_ends_at_theta_minus(difference: str, dtype: torch.dtype) -> None:
    problem, same = weight_net(seed=32, dtype=dtype), weight_net(seed=32, dtype=dtype)
    optimizers = [after_steps(p, 2) for p in (problem, same)]
    before = snapshot(problem.theta)
    out = meta_grad(problem, optimizers[0], alpha=0.3, update_base=True, difference=difference)
    meta_grad(same, optimizers[1], alpha=0.3, update_base=True)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps}
    for p, q in zip(problem.theta, same.theta, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **tolerance)
    length = (flat(problem.theta).double() - flat(tuple(before)).double()).norm()
    assert float(length) == pytest.approx(0.3, rel=0.05 if dtype == torch.bfloat16 else 1e-5)
    assert all(p.requires_grad for p in problem.theta) and out.grads[0].isfinite().all()
    problem.base_loss().backward()  # no tangent is left, and autograd works as before


def test_update_base_tells_autograd_that_theta_changed() -> None:
    for difference in ("forward", "exact"):
        problem = weight_net(seed=33)
        pending, again = problem.base_loss(), problem.base_loss()
        meta_grad(problem, None, adaptation="none", difference=difference)
        torch.autograd.grad(pending, problem.theta)
        meta_grad(problem, None, adaptation="none", difference=difference, update_base=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(again, problem.theta)


@pytest.mark.parametrize("update_base", [False, True])
@pytest.mark.parametrize("difference", ["forward", "exact"])
@pytest.mark.parametrize("case", ["first step", "nan", "inf", "zero"])
def test_degenerate(case: str, difference: str, update_base: bool) -> None:
    problem = weight_net(seed=8)
    optimizer = after_steps(problem, 2, steps=1 if case == "first step" else 3)
    original = problem.meta_loss
    factor = {"first step": 1.0, "nan": math.nan, "inf": math.inf, "zero": 0.0}[case]
    problem.meta_loss = lambda: factor * original()
    before = snapshot(problem.theta)
    out = meta_grad(problem, optimizer, update_base=update_base, difference=difference)
    assert out.degenerate and out.epsilon == 0
    assert all((g == 0).all() for g in out.grads)
    assert all(same_bits(p, q) for p, q in zip(problem.theta, before, strict=True))


@pytest.mark.parametrize("difference", ["forward", "exact"])
def test_explicit_meta_gradient_and_microbatches(difference: str) -> None:
    problem = weight_net(seed=34)
    plain, original, lam = problem.base_loss, problem.meta_loss, problem.lam[0]
    options = {"adaptation": "none", "difference": difference}
    single = meta_grad(problem, None, **options)
    problem.base_loss = [plain, lambda: 2 * plain()]  # type: ignore[assignment]
    problem.meta_loss = lambda: original() + (lam**3).sum()
    both = meta_grad(problem, None, **options)
    for i, (one, out) in enumerate(zip(single.grads, both.grads, strict=True)):
        explicit = 3 * lam.detach() ** 2 if i == 0 else 0
        torch.testing.assert_close(out, 3 * one + explicit, rtol=1e-9, atol=1e-13)
    assert both.base_loss_plus == pytest.approx(3 * float(single.base_loss_plus))


@pytest.mark.parametrize("difference", ["central", "forward", "exact"])
def test_lambda_that_does_not_meet_theta(difference: str) -> None:
    """Read in a term of its own: the mixed derivative is 0. Not read at all: an error."""
    theta, lam = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    unread = torch.ones(2, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"base_params": [theta], "optimizer": None, "adaptation": "none"}

    def run(meta_params: list[Tensor]) -> sk.MetaGradient:
        return sk.meta_grad(
            lambda: theta.square().sum() + lam.exp().sum(),
            lambda: theta.sum(),
            meta_params=meta_params,
            difference=difference,
            **options,
        )

    out = run([lam, unread])
    assert not out.degenerate and all((g == 0).all() for g in out.grads)
    with pytest.raises(ValueError, match=r"meta_params: base_loss does not read any"):
        run([unread])


@pytest.mark.parametrize("how", ["detach", "data", "no_grad", "item"])
def test_exact_sees_what_the_base_gradient_sees(how: str) -> None:
    """Values that the base gradient holds still carry no tangent, however they are made; the central difference moves
    them (and warns where it can see it)."""
    problem = weight_net(seed=35)
    net, weigher = problem.net, problem.weigher
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)

    def still() -> Tensor:
        if how == "no_grad":
            with torch.no_grad():
                return F.softplus((net(x) - y).square()) * 1.5
        losses = F.softplus((net(x) - y).square()) * 1.5
        return {
            "detach": losses.detach,
            "data": lambda: losses.data,
            "item": lambda: losses.new_tensor(losses.tolist()),
        }[how]()

    def base() -> Tensor:
        return (weigher(still()) * (net(x) - y).square()).mean()

    problem.base_loss = base
    expected = mixed_derivative(problem, direct_gradient(problem))
    out = meta_grad(problem, None, adaptation="none", difference="exact")
    assert relative_error(flat(out.grads), expected) < 1e-12


@pytest.mark.filterwarnings("ignore:sama_kernels. base_loss")
def test_a_closure_without_stop_gradient_is_wrong_in_the_differences_only() -> None:
    problem = weight_net(seed=0, hold="detach")
    expected = mixed_derivative(problem, direct_gradient(problem))
    errors = {
        how: relative_error(flat(meta_grad(problem, None, adaptation="none", difference=how).grads), expected)
        for how in ("central", "forward", "exact")
    }
    assert errors["exact"] < 1e-12 and errors["central"] > 0.3 and errors["forward"] > 0.3


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(6), nn.LayerNorm(6), nn.RMSNorm(6), nn.Softmax(1), nn.GELU()], ids=str
)
def test_lambda_before_theta_and_frozen_parameters(layer: nn.Module) -> None:
    """Normalisations and softmax are what goes wrong if the derivative in lambda is taken of the loss's tangent."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), layer, nn.Tanh(), nn.Linear(6, 1)).double()
    net[0].bias.requires_grad_(False)
    prompt = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x, y, xm, ym = (torch.randn(16, k, dtype=torch.float64) for k in (5, 1, 5, 1))
    base = lambda: (net(x + prompt * x.square()) - y).square().mean()  # noqa: E731
    meta = lambda: (net(xm) - ym).square().mean()  # noqa: E731
    theta = tuple(p for p in net.parameters() if p.requires_grad)
    v = torch.autograd.grad(meta(), theta)
    g = torch.autograd.grad(base(), theta, create_graph=True)
    (expected,) = torch.autograd.grad(-sum((a * b).sum() for a, b in zip(g, v, strict=True)), [prompt])
    out = sk.meta_grad(
        base, meta, base_params=net, meta_params=[prompt], optimizer=None, adaptation="none", difference="exact"
    )
    assert relative_error(out.grads[0], expected) < 1e-11
    assert not net[0].bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_in_low_precision(dtype: torch.dtype) -> None:
    """Against double backward in the same dtype: about as far from float64 as that is."""
    problem, precise = weight_net(seed=36, dtype=dtype), weight_net(seed=36)
    with torch.no_grad():
        for p, q in zip((*problem.theta, *problem.lam), (*precise.theta, *precise.lam), strict=True):
            q.copy_(p)
    x, y = torch.randn(24, 5).to(dtype), torch.randn(24, 1).to(dtype)

    def closures(one: Bilevel, wide: torch.dtype) -> None:
        a, b = x.to(wide), y.to(wide)

        def base() -> Tensor:
            losses = (one.net(a) - b).square()
            return (one.weigher(sk.stop_gradient(losses)) * losses).mean()

        one.base_loss = base
        one.meta_loss = lambda: (one.net(a.flip(0)) - b).square().mean()

    closures(problem, dtype)
    closures(precise, torch.float64)
    expected = mixed_derivative(precise, direct_gradient(precise))
    double_backward = relative_error(flat(mixed_derivative(problem, direct_gradient(problem))).double(), expected)
    out = meta_grad(problem, None, adaptation="none", difference="exact")
    assert relative_error(flat(out.grads).double(), expected) < 3 * double_backward + 2 * torch.finfo(dtype).eps


def test_tiny_directions_do_not_underflow_in_exact() -> None:
    """||v|| = 1e-7 in float16: the tangents are those of v / ||v||."""
    w = torch.randn(64).to(torch.float16).requires_grad_()
    lam = torch.rand(64).to(torch.float16).requires_grad_()
    out = sk.meta_grad(
        lambda: (lam * w).float().sum(),
        lambda: (w.float() * 2e-6).sum(),
        base_params=[w],
        meta_params=[lam],
        optimizer=None,
        adaptation="none",
        difference="exact",
    )
    torch.testing.assert_close(out.grads[0].float(), torch.full((64,), -2e-6), rtol=0.05, atol=0)
