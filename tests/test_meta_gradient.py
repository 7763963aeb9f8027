"""The meta gradient against exact double backward and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
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
from test_adaptation import adapted
from torch import Tensor, nn

import sama_kernels as sk


@pytest.mark.parametrize("hold", ["auto", "center"])
@pytest.mark.parametrize("adaptation", ["paper", "exact", "none"])
@pytest.mark.parametrize("case", range(len(OPTIMIZERS)))
def test_converges_to_exact_double_backward_as_alpha_squared(case: int, adaptation: str, hold: str) -> None:
    problem = weight_net(seed=case)
    optimizer = after_steps(problem, case)
    d = direct_gradient(problem)
    v, norm = adapted(optimizer, list(problem.theta), list(d), adaptation, "reference")
    problem.base_loss()  # the tape of "auto" then holds values at today's theta, like "center"
    exact = mixed_derivative(problem, tuple(v))
    errors = []
    for alpha in (3e-2, 1e-2):
        out = meta_grad(problem, optimizer, alpha=alpha, adaptation=adaptation, hold=hold)
        errors.append(relative_error(flat(out.grads), exact))
        torch.testing.assert_close(out.norm, norm)
        torch.testing.assert_close(out.epsilon, alpha / norm)
    assert errors[1] < 2e-3
    assert math.log(errors[0] / errors[1]) / math.log(3) == pytest.approx(2, abs=0.1)
    assert (
        relative_error(flat(meta_grad(problem, optimizer, alpha=1e-4, adaptation=adaptation, hold=hold).grads), exact)
        < 1e-6
    )


def test_closed_form_of_biased_regression() -> None:
    """Appendix E: L_base = |Xw - y|^2 + beta |w - lambda|^2 is quadratic, so the central difference is exact, and
    with D = I the SAMA gradient is -d2L_base/dlambda dw v = 2 beta dL_meta/dw."""
    torch.manual_seed(0)
    beta = 0.1
    x, y, x_meta, y_meta = (torch.randn(*s, dtype=torch.float64) for s in ((30, 6), (30,), (20, 6), (20,)))
    lam = torch.randn(6, dtype=torch.float64, requires_grad=True)
    w = torch.linalg.solve(x.T @ x + beta * torch.eye(6), x.T @ y + beta * lam.detach()).requires_grad_()
    out = sk.meta_grad(
        lambda: (x @ w - y).square().sum() + beta * (w - lam).square().sum(),
        lambda: (x_meta @ w - y_meta).square().sum(),
        base_params=[w],
        meta_params=[lam],
        optimizer=None,
        adaptation="none",
    )
    sama = 2 * beta * 2 * x_meta.T @ (x_meta @ w - y_meta)
    torch.testing.assert_close(out.grads[0], sama.detach(), rtol=1e-10, atol=1e-10)
    hypergradient = beta * torch.linalg.solve(x.T @ x + beta * torch.eye(6), 2 * x_meta.T @ (x_meta @ w - y_meta))
    cosine = torch.nn.functional.cosine_similarity(out.grads[0], hypergradient.detach(), dim=0)
    assert 0.5 < cosine < 1  # an approximation of it, in a good direction


def test_explicit_meta_gradient_is_added() -> None:
    problem = weight_net(seed=2)
    optimizer = after_steps(problem, 2)
    plain = meta_grad(problem, optimizer)
    original = problem.meta_loss
    first = problem.lam[0]
    problem.meta_loss = lambda: original() + (first**3).sum()
    out = meta_grad(problem, optimizer)
    torch.testing.assert_close(out.grads[0], plain.grads[0] + 3 * first.detach() ** 2)
    for got, expected in zip(out.grads[1:], plain.grads[1:], strict=True):
        assert torch.equal(got, expected)


def test_update_base_leaves_theta_at_theta_minus() -> None:
    problem = weight_net(seed=7)
    optimizer = after_steps(problem, 2)
    before = snapshot(problem.theta)
    v, norm = adapted(optimizer, list(problem.theta), list(direct_gradient(problem)), "paper", "reference")
    out = meta_grad(problem, optimizer, alpha=0.3, update_base=True)
    for p, old, x in zip(problem.theta, before, v, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.3 / norm * x, rtol=1e-13, atol=1e-14)
    assert relative_error(flat(problem.theta), flat(before)) > 1e-2
    problem.base_loss()
    assert not out.degenerate and all(p.requires_grad for p in problem.theta)


@pytest.mark.parametrize("update_base", [False, True])
@pytest.mark.parametrize("case", ["first step", "nan", "inf", "zero"])
def test_degenerate_is_a_zero_gradient_and_moves_nothing(case: str, update_base: bool) -> None:
    problem = weight_net(seed=8)
    optimizer = after_steps(problem, 2, steps=1 if case == "first step" else 3)
    original = problem.meta_loss
    factor = {"first step": 1.0, "nan": math.nan, "inf": math.inf, "zero": 0.0}[case]
    problem.meta_loss = lambda: factor * original()
    before = snapshot(problem.theta)
    out = meta_grad(problem, optimizer, update_base=update_base)
    assert out.degenerate and out.epsilon == 0
    assert all((g == 0).all() for g in out.grads)
    assert all(same_bits(p, q) for p, q in zip(problem.theta, before, strict=True))
    torch.testing.assert_close(out.base_loss_plus, out.base_loss_minus, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_parameters(dtype: torch.dtype) -> None:
    """Against the float64 meta gradient at the same (rounded) parameters and state."""
    problem, precise = weight_net(seed=9, dtype=dtype), weight_net(seed=9)
    with torch.no_grad():
        for module, reference in ((problem.net, precise.net), (problem.weigher, precise.weigher)):
            for p, q in zip(module.parameters(), reference.parameters(), strict=True):
                q.copy_(p)
    x, y, x_meta, y_meta = (torch.randn(24, k).to(dtype) for k in (5, 1, 5, 1))

    def closures(problem: Bilevel, wide: torch.dtype) -> None:
        a, b, c, e = (t.to(wide) for t in (x, y, x_meta, y_meta))

        def base() -> Tensor:
            losses = (problem.net(a) - b).square()
            return (problem.weigher(sk.stop_gradient(losses)) * losses).mean()

        problem.base_loss = base
        problem.meta_loss = lambda: (problem.net(c) - e).square().mean()

    closures(problem, dtype)
    closures(precise, torch.float64)
    out = sk.meta_grad(
        problem.base_loss,
        problem.meta_loss,
        base_params=problem.net,
        meta_params=problem.weigher,
        optimizer=None,
        adaptation="none",
        alpha=0.3,
    )
    expected = sk.meta_grad(
        precise.base_loss,
        precise.meta_loss,
        base_params=precise.net,
        meta_params=precise.weigher,
        optimizer=None,
        adaptation="none",
        alpha=0.3,
    )
    assert [g.dtype for g in out.grads] == [dtype] * len(out.grads)
    tolerance = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.4}[dtype]
    assert relative_error(flat(out.grads).double(), flat(expected.grads)) < tolerance


def test_same_bits_every_time_and_on_every_backend() -> None:
    problem = weight_net(seed=10, dtype=torch.float32)
    optimizer = after_steps(problem, 2)
    runs = [meta_grad(problem, optimizer, backend=b, alpha=0.1) for b in ("cpu", "cpu", "auto", "reference")]
    for run in runs[1:3]:
        assert all(torch.equal(a, b) for a, b in zip(run.grads, runs[0].grads, strict=True))
    assert relative_error(flat(runs[3].grads), flat(runs[0].grads)) < 1e-4


def test_shared_gradient_buffers_do_not_corrupt_v() -> None:
    """autograd hands out one tensor as the gradient of a, b and c; writing v in place must not mix them up."""
    a, b, c = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    lam = torch.randn(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 2.0}, {"params": [c], "lr": 3.0}])
    out = sk.meta_grad(
        lambda: (lam * (a + 2 * b + 3 * c)).sum(),
        lambda: (a + b + c).sum(),
        base_params=[a, b, c],
        meta_params=[lam],
        optimizer=optimizer,
    )
    torch.testing.assert_close(out.norm, torch.tensor(math.sqrt(4 * (1 + 4 + 9)), dtype=torch.float64))
    torch.testing.assert_close(out.grads[0], torch.full((4,), -(1.0 + 2 * 2 + 3 * 3), dtype=torch.float64))


def test_lambda_inside_the_base_network() -> None:
    """Soft-prompt-like: lambda enters before theta, so the perturbed passes differentiate through frozen layers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    prompt = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x, y, xm, ym = (torch.randn(16, k, dtype=torch.float64) for k in (5, 1, 5, 1))
    base = lambda: (net(x + prompt) - y).square().mean()  # noqa: E731
    meta = lambda: (net(xm) - ym).square().mean()  # noqa: E731
    out = sk.meta_grad(base, meta, base_params=net, meta_params=[prompt], optimizer=None, adaptation="none", alpha=1e-3)
    theta = tuple(net.parameters())
    v = torch.autograd.grad(meta(), theta)
    g = torch.autograd.grad(base(), theta, create_graph=True)
    (exact,) = torch.autograd.grad(-sum((a * b).sum() for a, b in zip(g, v, strict=True)), [prompt])
    assert relative_error(out.grads[0], exact) < 1e-5


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_meta_loss_that_reads_nothing_the_optimizer_moved(backend: str) -> None:
    """v = 0: a zero meta gradient, not an error in the training loop."""
    moved, unmoved = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    lam = torch.rand(3, requires_grad=True)
    optimizer = torch.optim.Adam([moved, unmoved], lr=0.1)
    for _ in range(2):
        moved.grad = torch.randn(3)
        optimizer.step()
    out = sk.meta_grad(
        lambda: (lam * moved * unmoved).sum(),
        lambda: unmoved.square().sum(),
        base_params=[moved, unmoved],
        meta_params=[lam],
        optimizer=optimizer,
        backend=backend,
    )
    assert out.degenerate and torch.equal(out.grads[0], torch.zeros(3))
