"""F2SA and BOME: their formulas, written out, and where they end on a problem whose solution is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import relative_error
from test_algorithms import ONE, N, Quadratic
from torch import Tensor

from sama_kernels.algorithms import BOME, F2SA


def at_solution(q: Quadratic, multiplier: float) -> tuple[Tensor, Tensor]:
    """theta and z where F2SA's two inner problems stand still: both have closed forms."""
    b = q.b @ q.lam.detach()
    theta = torch.linalg.solve(ONE + multiplier * q.a, q.c + multiplier * b)
    return theta, torch.linalg.solve(q.a, b)


def put(q: Quadratic, flat: Tensor) -> None:
    with torch.no_grad():
        for p, part in zip(q.net, torch.split(flat, [p.numel() for p in q.net]), strict=True):
            p.copy_(part.view(p.shape))


@pytest.mark.parametrize("seed", range(3))
def test_f2sa_converges_to_the_exact_gradient_like_one_over_m(seed: int) -> None:
    q = Quadratic.random(seed)
    solution = torch.linalg.solve(q.a, q.b @ q.lam.detach())
    exact = q.b.T @ q.a.inverse() @ (solution - q.c) + q.e
    errors = []
    for m in (1e2, 1e3, 1e4):
        theta, z = at_solution(q, m)
        put(q, theta)
        method = F2SA(q.net, [q.lam], lr=1e-6, inner_lr=0.1, multiplier=m)
        for x, part in zip(method.z, torch.split(z, [p.numel() for p in q.net]), strict=True):
            x.copy_(part.view(x.shape))
        q.lam.grad = None
        method.step(q.base_loss, q.meta_loss)
        errors.append(relative_error(q.lam.grad, exact))
        assert relative_error(q.theta.detach(), theta) < 1e-9  # they stand still
    assert errors[0] < 0.1 and errors[1] < errors[0] / 7 and errors[2] < errors[1] / 7


def test_a_step_of_f2sa_is_its_formula() -> None:
    q, m = Quadratic.random(0), 3.0
    method = F2SA(q.net, [q.lam], lr=0.01, inner_lr=0.05, inner_steps=2, multiplier=m, growth=0.5)
    theta, b = q.theta.detach().clone(), q.b @ q.lam.detach()
    z = theta
    for _ in range(2):
        z = z - 0.05 * (q.a @ z - b)
    out = method.step(q.base_loss, q.meta_loss)
    expected = theta - 0.01 * ((theta - q.c) + m * (q.a @ theta - b))
    torch.testing.assert_close(q.theta.detach(), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(torch.cat([x.flatten() for x in method.z]), z, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(q.lam.grad, q.e + m * (-q.b.T @ theta + q.b.T @ z), rtol=1e-12, atol=1e-12)
    assert float(out.multiplier) == m and method.multiplier == m + 0.5
    torch.testing.assert_close(out.solution_loss, z @ q.a @ z / 2 - z @ b)
    saved = method.state_dict()
    again = F2SA(q.net, [q.lam], lr=0.01, inner_lr=0.05, inner_steps=2)
    again.load_state_dict(saved)
    assert again.multiplier == method.multiplier and torch.equal(again.z[0], method.z[0])


def test_a_step_of_bome_is_its_formula() -> None:
    q, eta = Quadratic.random(1), 0.7
    theta, b = q.theta.detach().clone(), q.b @ q.lam.detach()
    z = theta
    for _ in range(3):
        z = z - 0.05 * (q.a @ z - b)
    f, q_theta, q_lam = torch.cat([theta - q.c, q.e]), q.a @ theta - b, -q.b.T @ theta + q.b.T @ z
    dq = torch.cat([q_theta, q_lam])
    m = max(float((eta * dq @ dq - f @ dq) / (dq @ dq)), 0.0)
    assert m > 0
    out = BOME(q.net, [q.lam], lr=0.01, inner_lr=0.05, inner_steps=3, eta=eta).step(q.base_loss, q.meta_loss)
    assert abs(float(out.multiplier) - m) < 1e-12
    torch.testing.assert_close(q.theta.detach(), theta - 0.01 * (f[:N] + m * q_theta), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(q.lam.grad, q.e + m * q_lam, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["F2SA", "BOME"])
def test_both_find_the_solution(name: str) -> None:
    """min |theta*(lambda) - c|^2 with theta* = A^-1 B lambda: linear least squares in lambda."""
    q = Quadratic.random(2, spread=1.0)
    q.e = torch.zeros_like(q.e)
    make: Any = {
        "F2SA": lambda: F2SA(q.net, [q.lam], lr=0.02, inner_lr=0.5, inner_steps=5, multiplier=30.0),
        "BOME": lambda: BOME(q.net, [q.lam], lr=0.1, inner_lr=0.5, inner_steps=10),
    }[name]
    method, optimizer = make(), torch.optim.SGD([q.lam], lr={"F2SA": 0.005, "BOME": 0.1}[name])
    best = torch.linalg.lstsq(q.a.inverse() @ q.b, q.c[:, None], driver="gelsd").solution[:, 0]
    first = float((q.lam.detach() - best).norm())
    for _ in range(400):
        optimizer.zero_grad()
        method.step(q.base_loss, q.meta_loss)
        optimizer.step()
    assert float((q.lam.detach() - best).norm()) < 0.05 * first


def test_bad_options() -> None:
    q = Quadratic.random(0)
    with pytest.raises(ValueError, match="inner_steps: must be at least 1, got 0"):
        BOME(q.net, [q.lam], lr=0.1, inner_lr=0.1, inner_steps=0)
    with pytest.raises(ValueError, match="lr: must be positive"):
        F2SA(q.net, [q.lam], lr=0.0, inner_lr=0.1)
    with pytest.raises(ValueError, match="found in no module"):
        x = torch.ones(2, requires_grad=True)
        F2SA([x], [q.lam], lr=0.1, inner_lr=0.1).step(lambda: x.sum() * q.lam.sum(), lambda: x.sum())


@pytest.mark.parametrize("method", [F2SA, BOME])
def test_every_step_draws_masks_of_its_own(method: Any) -> None:
    """The same in all passes of a step; after an error the generator is where it was."""
    torch.manual_seed(14)
    net, dropout = torch.nn.Linear(6, 1), torch.nn.Dropout(0.5)
    lam, x, drawn = torch.zeros(20, 1, requires_grad=True), torch.ones(20, 6), []

    def base_loss() -> Tensor:
        dropped = dropout(x)
        drawn.append(tuple(dropped.flatten().tolist()))
        return (lam.sigmoid() * net(dropped).square()).mean()

    solver = method(net, [lam], lr=1e-3, inner_lr=1e-2)
    masks = []
    for _ in range(4):
        drawn.clear()
        solver.step(base_loss, lambda: (net(x) - 1).square().mean())
        assert len(set(drawn)) == 1
        masks.append(drawn[0])
    assert len(set(masks)) == 4
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="meta_loss"):
        solver.step(base_loss, lambda: net(x))
    assert torch.equal(torch.get_rng_state(), state)
