"""Second-order algorithms with what surrounds a step: clipping, hooks, skipped steps, compiled models, classes of
optimizers of one's own, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain import Plain
from problems import OPTIMIZERS, flat, relative_error
from torch import Tensor, nn

import sama_kernels as sk
from sama_kernels.algorithms import BOME, F2SA, T1T2, Iterative, Neumann, Truncated

SGD_AND_ADAM = [OPTIMIZERS[0], OPTIMIZERS[2]]


@pytest.mark.parametrize("rank_one", [False, True])
@pytest.mark.parametrize("case", SGD_AND_ADAM, ids=["SGD", "Adam"])
def test_clipping_by_norm_is_a_factor_of_d(case: Any, rank_one: bool) -> None:
    """T1T2 with D is SAMA, whose clipping has tests of its own; two steps of Truncated are
    w = D (2 I - H D) d, where D is read off meta steps of linear losses."""
    problem = Plain()
    optimizer, coef = problem.trained(case, max_norm=0.005)
    assert coef is not None and coef < 0.5
    options = {"clip_coef": coef, "clip_rank_one": rank_one, "adaptation": "exact"}
    sama = problem.grad(optimizer, "sama", difference="exact", **options)
    assert relative_error(problem.grad(optimizer, T1T2(adapt=True), **options), sama) < 1e-10
    assert relative_error(problem.grad(optimizer, Truncated(steps=1), **options), sama) < 1e-10

    def adapted(d: list[Tensor]) -> list[Tensor]:
        """(du/dg)^T d, read off a meta step of the base loss <theta, mu> and the meta loss <theta, d>."""
        mu = [torch.zeros_like(p, requires_grad=True) for p in problem.theta]

        def inner(a: list[Tensor]) -> Tensor:
            return torch.stack([(p * x).sum() for p, x in zip(problem.theta, a, strict=True)]).sum()

        out = sk.meta_grad(
            lambda: inner(mu), lambda: inner(d), base_params=problem.net, meta_params=mu, optimizer=optimizer,
            difference="exact", **options,
        )  # fmt: skip
        return [-g for g in out.grads]

    d = list(torch.autograd.grad(problem.meta_loss(), problem.theta))
    g = torch.autograd.grad(problem.base_loss(), problem.theta, create_graph=True)
    once = adapted(d)
    product = torch.autograd.grad(g, problem.theta, once, retain_graph=True)
    w = adapted([2 * a - b for a, b in zip(d, product, strict=True)])
    expected = -torch.autograd.grad(g, problem.lam, w)[0]
    assert relative_error(problem.grad(optimizer, Truncated(steps=2), **options), expected) < 1e-10


@pytest.mark.parametrize("algorithm", [T1T2(adapt=True), T1T2(), Truncated(steps=2), Iterative(steps=2)])
def test_no_meta_gradient_from_a_skipped_fused_step(algorithm: Any) -> None:
    problem = Plain(torch.float32)
    optimizer = torch.optim.Adam(problem.theta, lr=0.01, fused=True)
    problem.base_loss().backward()
    optimizer.step()
    for flag, skipped in ((0.0, False), (1.0, True)):
        optimizer.found_inf = torch.tensor(flag)  # type: ignore[attr-defined]  # as a GradScaler lends it for a step
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
        out = problem.meta_step(optimizer, algorithm, meta_loss=lambda: problem.meta_loss() + problem.lam.sum())
        assert bool(out.degenerate) is skipped and bool((out.grads[0] == 0).all()) is skipped


@pytest.mark.parametrize(
    "algorithm", [T1T2(), T1T2(adapt=True), Neumann(terms=2), Truncated(steps=2), Iterative(steps=3)]
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_hooks_on_theta_act_once_in_each_gradient(algorithm: Any, checkpointed: bool) -> None:
    """A hook that scales the gradient is a base loss of that size: for the meta loss it is not there."""
    if isinstance(algorithm, Iterative):
        algorithm = Iterative(steps=3, checkpoint=checkpointed)
    hooked, scaled = Plain(), Plain()
    scaled.net.load_state_dict(hooked.net.state_dict())
    scaled.lam, scaled.x, scaled.y, scaled.x_meta = hooked.lam, hooked.x, hooked.y, hooked.x_meta
    results = []
    for problem, factor in ((hooked, 1.0), (scaled, 0.1)):
        if problem is hooked:
            for p in problem.theta:
                p.register_hook(lambda g: 0.1 * g)
        optimizer = torch.optim.SGD(problem.theta, lr=0.3, momentum=0.5)

        def loss(problem: Plain = problem, factor: float = factor) -> Tensor:
            return factor * problem.base_loss()

        for _ in range(2):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        results.append(problem.grad(optimizer, algorithm, base_loss=loss))
        assert all(len(p._backward_hooks or ()) == (problem is hooked) for p in problem.theta)
    assert relative_error(*results) < 1e-12


@pytest.mark.parametrize("method", [F2SA, BOME])
def test_penalty_methods_take_hooks_on_theta_in_every_pass(method: Any) -> None:
    """A mask freezes the first layer, also in the inner steps: what that layer does is then no part of the result."""
    problem = Plain()
    for p in problem.theta[:2]:
        p.register_hook(torch.zeros_like)
    before = [p.detach().clone() for p in problem.theta]
    solver = method(problem.net, [problem.lam], lr=0.1, inner_lr=0.1, inner_steps=3)
    out = solver.step(problem.base_loss, problem.meta_loss)
    assert all(map(torch.equal, problem.theta[:2], before[:2]))
    z = [x.clone().requires_grad_() for x in before[2:]]
    fixed = torch.tanh(problem.x @ before[0].T + before[1])
    for _ in range(3):
        errors = (fixed @ z[0].T + z[1] - problem.y).square()
        loss = (problem.lam.detach().sigmoid()[:, None] * errors).mean()
        grads = torch.autograd.grad(loss, z)
        z = [(x - 0.1 * g).detach().requires_grad_() for x, g in zip(z, grads, strict=True)]
    errors = (fixed @ z[0].T + z[1] - problem.y).square()
    torch.testing.assert_close(out.solution_loss, (problem.lam.detach().sigmoid()[:, None] * errors).mean().detach())


class HalfStep(torch.optim.SGD):
    """A class of one's own, with an attribute that torch does not know of."""

    def __init__(self, params: Any, lr: float, share: float = 1.0) -> None:
        super().__init__(params, lr=lr)
        self.share = share

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        lrs = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] *= self.share
        super().step(closure)
        for group, lr in zip(self.param_groups, lrs, strict=True):
            group["lr"] = lr


@pytest.mark.parametrize("checkpointed", [False, True])
def test_iterative_steps_like_a_class_of_ones_own(checkpointed: bool) -> None:
    """As SGD with the learning rate that its steps have; also under a scheduler, which wraps `step` of the original."""
    problem = Plain()
    theta = [p.detach().clone() for p in problem.theta]
    results = []
    for optimizer in (HalfStep(problem.theta, lr=0.4, share=0.25), torch.optim.SGD(problem.theta, lr=0.1)):
        torch.optim.lr_scheduler.StepLR(optimizer, 10)
        options = Iterative(steps=3, checkpoint=checkpointed, advance=True)
        grads = problem.grad(optimizer, options)
        results.append([grads, *(p.detach().clone() for p in problem.theta)])
        with torch.no_grad():
            for p, x in zip(problem.theta, theta, strict=True):
                p.copy_(x)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)
    assert not torch.equal(results[0][1], theta[0])


def test_after_advance_the_gradient_is_not_that_of_the_last_step() -> None:
    problem = Plain()
    optimizer, _ = problem.trained(OPTIMIZERS[2])
    steps = sk.adaptation.steps_made(optimizer)
    problem.meta_step(optimizer, Iterative(steps=4, advance=True))
    assert sk.adaptation.steps_made(optimizer) == steps + 4
    with pytest.raises(
        ValueError, match=r"the .grad of tensor 0 .* was changed or replaced after the optimizer's last"
    ):
        problem.meta_step(optimizer, "sama")
    optimizer.zero_grad()
    problem.base_loss().backward()
    optimizer.step()
    assert not problem.meta_step(optimizer, "sama").degenerate


@pytest.mark.parametrize("method", [F2SA, BOME])
def test_penalty_methods_in_one_autocast_block_see_theta_move(method: Any) -> None:
    results = []
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for outside in (True, False):
        torch.set_rng_state(state)
        problem = Plain(torch.float32)
        solver = method(problem.net, [problem.lam], lr=0.3, inner_lr=0.1, inner_steps=2)

        def cast(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
            def wrapper() -> Tensor:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return loss()

            return wrapper

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
            losses = (problem.base_loss, problem.meta_loss)
            inner = losses if outside else tuple(map(cast, losses))
            results.append([float(solver.step(*inner).meta_loss) for _ in range(4)])
    assert results[0] == results[1] and len(set(results[0])) == 4


def test_an_autocast_block_sees_theta_after_advance() -> None:
    problem = Plain(torch.float32)
    optimizer, _ = problem.trained(OPTIMIZERS[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        problem.meta_loss()
        problem.meta_step(optimizer, Iterative(steps=3, advance=True))
        after = problem.meta_loss().detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(after, problem.meta_loss())


@pytest.mark.parametrize("algorithm", [T1T2(), Iterative(steps=2)])
def test_compiled_models_run_eagerly(algorithm: Any) -> None:
    """torch.compile's backward can be differentiated once; the same numbers as without it."""
    problem = Plain()
    optimizer, _ = problem.trained(OPTIMIZERS[0])
    expected = problem.grad(optimizer, algorithm)
    compiled = torch.compile(problem.net, backend="aot_eager")

    def base_loss() -> Tensor:
        return (problem.lam.sigmoid()[:, None] * (compiled(problem.x) - problem.y).square()).mean()

    base_loss().backward()
    optimizer.zero_grad()
    problem.lam.grad = None
    optimizer, _ = torch.optim.SGD(problem.theta, lr=0.1), None
    got = problem.grad(optimizer, algorithm, base_loss=base_loss)
    assert relative_error(got, expected) < 1e-10


@pytest.mark.parametrize("method", [F2SA, BOME])
def test_penalty_methods_without_lambda_and_after_an_error(method: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    lam, x = torch.zeros(6, 1, requires_grad=True), torch.randn(6, 3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    solver = method(net, [lam], lr=0.1, inner_lr=0.1)
    with pytest.raises(ValueError, match="meta_params: neither base_loss nor meta_loss reads any of them"):
        solver.step(lambda: net(x).square().mean(), lambda: net(x).mean())
    with pytest.raises(ValueError, match="meta_loss: must return a scalar"):
        solver.step(lambda: (lam.sigmoid() * net(x).square()).mean(), lambda: net(x))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    solver.step(lambda: (lam.sigmoid() * net(x).square()).mean(), lambda: net(x).mean())
    assert int(net[1].num_batches_tracked) == 2  # one pass of the base loss at theta, and that of the meta loss


def test_the_grads_are_of_lambda_alone() -> None:
    """No algorithm of this file writes `.grad`."""
    problem = Plain()
    optimizer, _ = problem.trained(OPTIMIZERS[0])
    before = flat([p.grad for p in problem.theta if p.grad is not None])
    for algorithm in (T1T2(), Neumann(terms=2), Truncated(steps=2), Iterative(steps=2)):
        problem.meta_step(optimizer, algorithm)
    assert torch.equal(flat([p.grad for p in problem.theta if p.grad is not None]), before)
    assert problem.lam.grad is None
