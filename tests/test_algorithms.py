"""The implicit algorithms: closed forms on quadratic problems, orders of convergence, SAMA where they must agree."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from parallel import Divided
from problems import OPTIMIZERS, after_steps, flat, meta_grad, relative_error, same_bits, snapshot, weight_net
from ranks import run_ranks
from torch import Tensor, nn

import sama_kernels as sk
from sama_kernels import adaptation as adaptations
from sama_kernels.algorithms import T1T2, ConjugateGradient, Iterative, Neumann, Nystrom, Truncated

N, M = 7, 3
ONE = torch.eye(N, dtype=torch.float64)


@dataclass
class Quadratic:
    """L_base = theta^T A theta / 2 - theta^T B lambda, L_meta = |theta - c|^2 / 2 (+ lambda^T e, explicit)."""

    net: nn.ParameterList
    lam: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    e: Tensor

    @classmethod
    def random(cls, seed: int, spread: float = 3.0) -> Quadratic:
        torch.manual_seed(seed)
        q = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64)).Q
        a = q @ torch.diag(torch.linspace(0.5, 0.5 + spread, N, dtype=torch.float64)) @ q.T
        net = nn.ParameterList([torch.randn(4, 1, dtype=torch.float64), torch.randn(3, dtype=torch.float64)])
        lam = torch.randn(M, dtype=torch.float64, requires_grad=True)
        b, c, e = (torch.randn(s, dtype=torch.float64) for s in ((N, M), (N,), (M,)))
        return cls(net, lam, a, b, c, e)

    @property
    def theta(self) -> Tensor:
        return torch.cat([p.flatten() for p in self.net])

    def base_loss(self) -> Tensor:
        return self.theta @ self.a @ self.theta / 2 - self.theta @ self.b @ self.lam

    def meta_loss(self) -> Tensor:
        return (self.theta - self.c).square().sum() / 2 + self.lam @ self.e

    def exact(self, inverse: Tensor) -> Tensor:
        """-(d^2 L_base / dlambda dtheta) H^-1 d + explicit, the mixed derivative being -B^T."""
        return self.b.T @ inverse @ (self.theta - self.c).detach() + self.e

    def run(self, algorithm: Any, optimizer: Any = None, **options: Any) -> Tensor:
        if optimizer is None:
            options = {"adaptation": "none", **options}
        out = sk.meta_grad(
            self.base_loss, self.meta_loss, base_params=self.net, meta_params=[self.lam], optimizer=optimizer,
            algorithm=algorithm, **options,
        )  # fmt: skip
        assert not out.degenerate
        torch.testing.assert_close(out.meta_loss, self.meta_loss().detach())
        if "sama" not in str(algorithm):
            torch.testing.assert_close(out.base_loss_plus, self.base_loss().detach())
        return out.grads[0]

    def sgd(self, lr: float) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.net.parameters(), lr=lr)
        self.base_loss().backward()
        optimizer.step()
        self.lam.grad = None
        return optimizer


@pytest.mark.parametrize("seed", range(3))
def test_conjugate_gradients_end_at_the_exact_inverse(seed: int) -> None:
    q = Quadratic.random(seed)
    errors = [relative_error(q.run(ConjugateGradient(iterations=k)), q.exact(q.a.inverse())) for k in (1, N, 3 * N)]
    assert errors[0] > 1e-3 and errors[1] < 1e-9 and errors[2] < 1e-9  # and stay there
    damped = q.exact((q.a + 0.7 * ONE).inverse())
    assert relative_error(q.run(ConjugateGradient(iterations=N, damping=0.7)), damped) < 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_conjugate_gradients_converge_at_their_rate(seed: int) -> None:
    """In the norm of A the error falls by (sqrt k - 1) / (sqrt k + 1) a step at least, up to a factor 2, where k is the
    condition of A: Hestenes and Stiefel's bound (B is the identity here, so that w is seen)."""
    q = Quadratic.random(seed, spread=20.0)
    q.lam, q.b, q.e = torch.randn(N).double().requires_grad_(), ONE, torch.zeros(N, dtype=torch.float64)
    exact, root = q.exact(q.a.inverse()), float(torch.linalg.cond(q.a)) ** 0.5
    errors = [q.run(ConjugateGradient(iterations=k)) - exact for k in range(1, N)]
    sizes = [float(x @ q.a @ x) ** 0.5 for x in (exact, *errors)]
    bounds = [2 * sizes[0] * ((root - 1) / (root + 1)) ** k for k in range(N)]
    assert all(size <= bound for size, bound in zip(sizes, bounds, strict=True))
    assert sizes[-1] < 0.2 * sizes[0] and all(b < a for a, b in pairwise(sizes))


@pytest.mark.parametrize("seed", range(3))
def test_neumann_converges_at_the_rate_of_its_series(seed: int) -> None:
    """The error after K terms is (I - eta A)^(K+1) A^-1 d: known to the last digit."""
    q, eta = Quadratic.random(seed), 0.3
    step = ONE - eta * q.a
    for terms in (1, 2, 5, 20):
        rest = torch.linalg.matrix_power(step, terms + 1) @ q.a.inverse()
        assert relative_error(q.run(Neumann(terms=terms, step_size=eta)), q.exact(q.a.inverse() - rest)) < 1e-12
    assert relative_error(q.run(Neumann(terms=300, step_size=eta)), q.exact(q.a.inverse())) < 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_nystrom(seed: int) -> None:
    q = Quadratic.random(seed)
    full = q.exact((q.a + 0.1 * ONE).inverse())
    assert relative_error(q.run(Nystrom(rank=N, damping=0.1)), full) < 1e-9
    torch.manual_seed(5)
    chosen = torch.randperm(N)[:3]
    columns = q.a[:, chosen]
    low_rank = columns @ torch.linalg.pinv(q.a[chosen][:, chosen]) @ columns.T
    torch.manual_seed(5)
    got = q.run(Nystrom(rank=3, damping=0.1))
    assert relative_error(got, q.exact((low_rank + 0.1 * ONE).inverse())) < 1e-9
    assert relative_error(got, full) > 1e-3


def test_nystrom_where_the_loss_has_no_curvature() -> None:
    """Some rows of the Hessian are zero, as those of a dead unit are: the small system is singular."""
    q = Quadratic.random(3)
    curved = torch.tensor([1, 0, 1, 1, 0, 0, 1], dtype=torch.float64)
    q.a = curved[:, None] * q.a * curved
    exact = q.exact((q.a + 0.1 * ONE).inverse())
    found = []
    for _ in range(50):
        freed = [torch.full((n,), 7, dtype=torch.int32) for n in range(1, 4 * N)]  # what memory holds must not matter
        del freed
        found.append(q.run(Nystrom(rank=N, damping=0.1)))
    assert all(relative_error(x, exact) < 1e-9 for x in found), max(relative_error(x, exact) for x in found)


def test_truncated_is_the_series_of_the_optimizers_own_steps() -> None:
    q = Quadratic.random(0)
    optimizer = q.sgd(0.2)
    for steps in (1, 4):
        series = sum(torch.linalg.matrix_power(ONE - 0.2 * q.a, k) for k in range(steps))
        assert relative_error(q.run(Truncated(steps=steps), optimizer), q.exact(0.2 * series)) < 1e-12
    assert relative_error(q.run(Truncated(steps=400), optimizer), q.exact(q.a.inverse())) < 1e-9


def test_all_agree_with_sama_where_the_hessian_is_the_identity() -> None:
    q = Quadratic.random(1, spread=0.0)
    q.a = ONE
    expected = q.exact(ONE)
    inverting = [ConjugateGradient(iterations=1), Neumann(step_size=1.0), Nystrom(rank=N, damping=1e-9)]
    for algorithm in ("sama_na", "t1_t2", *inverting):
        assert relative_error(q.run(algorithm, alpha=1e-3), expected) < 1e-6, algorithm
    optimizer = q.sgd(0.3)
    expected = q.exact(0.3 * ONE)
    for algorithm in ("sama", T1T2(adapt=True), ConjugateGradient(adapt=True, iterations=1), Truncated(steps=1)):
        assert relative_error(q.run(algorithm, optimizer, alpha=1e-3), expected) < 1e-6, algorithm


@pytest.mark.parametrize("case", range(len(OPTIMIZERS)))
@pytest.mark.parametrize("adaptation", ["paper", "exact"])
def test_t1_t2_with_adaptation_is_sama_with_an_exact_derivative(case: int, adaptation: str) -> None:
    """For a net with weights that are functions of the losses (stop_gradient), of every optimizer."""
    problem = weight_net(3)
    optimizer = after_steps(problem, case)
    before = snapshot(problem.theta)
    sama = meta_grad(problem, optimizer, difference="exact", adaptation=adaptation, hold="center")
    t1_t2 = meta_grad(problem, optimizer, algorithm=T1T2(adapt=True), adaptation=adaptation)
    assert relative_error(flat(t1_t2.grads), flat(sama.grads)) < 1e-10
    torch.testing.assert_close(t1_t2.norm, sama.norm)
    truncated = meta_grad(problem, optimizer, algorithm=Truncated(steps=1), adaptation=adaptation)
    assert relative_error(flat(truncated.grads), flat(sama.grads)) < 1e-10
    assert all(same_bits(a, b) for a, b in zip(before, problem.theta, strict=True))


@pytest.mark.parametrize("case", [0, 2, 4])
def test_adaptation_multiplies_the_solution(case: int) -> None:
    """w <- D w (paper, Eq. 4): against the Hessian written out, and D by autograd through the optimizer's step."""
    problem = weight_net(4)
    optimizer = after_steps(problem, case)

    def series(h: Tensor, one: Tensor) -> Tensor:
        step = one - 0.5 * h
        return 0.5 * (one + step + step @ step)

    for algorithm, inverse in (
        (Neumann(adapt=True, terms=2, step_size=0.5), series),
        (ConjugateGradient(adapt=True, iterations=70, damping=1.0), lambda h, one: (h + one).inverse()),
    ):
        hessian, mixed = written_out(problem)
        d = flat(torch.autograd.grad(problem.meta_loss(), problem.theta))
        w = inverse(hessian, torch.eye(len(d)).double()) @ d
        adapted = flat(diagonal(problem, optimizer)) * w
        got = flat(meta_grad(problem, optimizer, algorithm=algorithm, adaptation="exact").grads)
        assert relative_error(got, -mixed @ adapted) < 1e-7


def written_out(problem: Any) -> tuple[Tensor, Tensor]:
    g = flat_graph(torch.autograd.grad(problem.base_loss(), problem.theta, create_graph=True))
    rows = [torch.autograd.grad(x, (*problem.theta, *problem.lam), retain_graph=True) for x in g]
    n = len(problem.theta)
    return torch.stack([flat(r[:n]) for r in rows]), torch.stack([flat(r[n:]) for r in rows]).T


def flat_graph(tensors: Any) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def diagonal(problem: Any, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """D = du/dg with the library's own adaptation, which tests/test_adaptation*.py hold against autograd."""
    v: list[Any] = [torch.ones_like(p) for p in problem.theta]
    adaptations.apply(adaptations.plan(optimizer, problem.theta, "exact"), v, "reference")
    return v


def test_dropout_is_that_of_one_function() -> None:
    """All Hessian products are on one graph, so the result is that of one draw of masks."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 1)).double()
    lam = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(6, 4).double(), torch.randn(6, 1).double()

    def base_loss() -> Tensor:
        decay = torch.stack([p.square().sum() for p in net.parameters()]).sum()
        return (torch.sigmoid(lam) * (net(x) - y).square().squeeze(1)).mean() + 0.1 * decay

    results = []
    for _ in range(2):
        torch.manual_seed(3)
        state = torch.get_rng_state()
        out = sk.meta_grad(
            base_loss, lambda: (net(x) - y).square().mean(), base_params=net, meta_params=[lam], optimizer=None,
            adaptation="none", algorithm=ConjugateGradient(iterations=40),
        )  # fmt: skip
        assert torch.equal(torch.get_rng_state(), state)
        results.append(out.grads[0])
    assert torch.equal(*results)


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "name": ({"algorithm": "maml"}, ValueError, r"algorithm: 'maml' is none of 'sama', 'sama_na', 't1_t2'"),
    "type": ({"algorithm": 3}, TypeError, r"algorithm: expected a name or an options object"),
    "update": ({"algorithm": "neumann", "update_base": True}, ValueError, r"update_base: it is a part of SAMA"),
    "damping": ({"algorithm": Nystrom(damping=0.0)}, ValueError, r"algorithm: Nystrom needs damping > 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    options, error, message = ERRORS[name]
    problem = weight_net(0)
    optimizer = after_steps(problem, 0)
    with pytest.raises(error, match=message):
        meta_grad(problem, optimizer, **options)


@pytest.mark.parametrize("make", [lambda: Neumann(terms=0), lambda: Neumann(step_size=-1.0), lambda: T1T2(adapt=1)])
def test_options_are_checked(make: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"algorithm: (Neumann|T1T2): "):
        make()


def test_missing_second_derivatives_are_explained() -> None:
    net = nn.Linear(4, 4)
    lam = torch.ones((), requires_grad=True)

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * 2

    x = torch.randn(3, 4)
    with pytest.raises(NotImplementedError, match="algorithm: it needs second derivatives"):
        sk.meta_grad(
            lambda: lam * Once.apply(net(x)).square().mean(), lambda: net(x).square().mean(), base_params=net,
            meta_params=[lam], optimizer=None, adaptation="none", algorithm="neumann",
        )  # fmt: skip


def test_fused_attention_is_explained() -> None:
    q = nn.Parameter(torch.randn(1, 2, 5, 8))
    net, lam = nn.ParameterList([q]), torch.ones((), requires_grad=True)

    def base_loss() -> Tensor:
        return lam * nn.functional.scaled_dot_product_attention(q, q, q).square().mean()

    with pytest.raises(NotImplementedError, match="unfused attention"):
        sk.meta_grad(
            base_loss, lambda: q.square().mean(), base_params=net, meta_params=[lam], optimizer=None,
            adaptation="none", algorithm="conjugate_gradient",
        )  # fmt: skip


def _on_ranks(rank: int, world: int, algorithm: Any, sync: str) -> Tensor:
    problem = Divided(rank, world)
    problem.explicit = True
    optimizer = problem.optimizer(0)
    problem.train(optimizer)
    return flat(problem.meta_grad(optimizer, algorithm=algorithm, sync=sync).grads)


@pytest.mark.parametrize(
    "algorithm", [T1T2(adapt=True), ConjugateGradient(iterations=2, damping=1.0), Iterative(steps=2)]
)
def test_several_processes_average_what_each_has_alone(algorithm: Any) -> None:
    expected = sum(_on_ranks(rank, 2, algorithm, "none") for rank in range(2)) / 2
    for got in run_ranks(2, _on_ranks, algorithm, "final"):
        assert relative_error(got, expected) < 1e-12


def test_diagnose_is_for_sama() -> None:
    problem = weight_net(0)
    optimizer = after_steps(problem, 0)
    arguments = {"base_params": problem.net, "meta_params": problem.weigher, "optimizer": optimizer}
    with pytest.raises(ValueError, match="algorithm: diagnose is about SAMA's difference"):
        sk.diagnose(problem.base_loss, problem.meta_loss, algorithm="neumann", **arguments)
    sk.diagnose(problem.base_loss, problem.meta_loss, algorithm="sama_na", alpha=0.01, **arguments)
