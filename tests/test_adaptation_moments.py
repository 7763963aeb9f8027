"""D of the optimizers of `adapt_norm_moments` against float64 autograd through torch's own steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import needs_cpu_kernels
from problems import relative_error
from stepping import adapted, differentiated, stepped
from torch import Tensor
from torch.optim import ASGD, Adadelta, Adagrad, Adamax, NAdam, RAdam, RMSprop

OPTIONS: dict[Any, list[dict[str, Any]]] = {
    NAdam: [
        {},
        {"betas": (0.8, 0.95), "eps": 0.1, "momentum_decay": 0.05},
        {"weight_decay": 0.3},
        {"weight_decay": 0.3, "decoupled_weight_decay": True, "maximize": True},
        {"weight_decay": 0.1, "maximize": True, "eps": 1e-3},
    ],
    RAdam: [
        {},  # rectified from step 6 on
        {"betas": (0.8, 0.95), "eps": 0.1},
        {"betas": (0.8, 0.6)},  # never rectified
        {"weight_decay": 0.3},
        {"weight_decay": 0.3, "decoupled_weight_decay": True, "maximize": True},
        {"weight_decay": 0.1, "maximize": True, "eps": 1e-3},
    ],
    Adagrad: [
        {},
        {"lr_decay": 0.1, "eps": 0.1},
        {"initial_accumulator_value": 0.5},
        {"weight_decay": 0.3, "lr_decay": 0.01},
        {"weight_decay": 0.1, "maximize": True, "eps": 1e-3},
    ],
    RMSprop: [
        {},
        {"alpha": 0.9, "eps": 0.1},
        {"weight_decay": 0.3},
        {"momentum": 0.9, "maximize": True},
        {"momentum": 0.9, "weight_decay": 0.3},
        {"centered": True},
        {"centered": True, "alpha": 0.8, "eps": 0.1},
        {"centered": True, "weight_decay": 0.3, "alpha": 0.9},
        {"centered": True, "weight_decay": 0.3, "alpha": 0.9, "momentum": 0.9},
        {"centered": True, "weight_decay": 0.1, "momentum": 0.5, "maximize": True, "eps": 1e-3},
        {"weight_decay": 0.1, "maximize": True, "eps": 1e-3},
    ],
    Adamax: [
        {},
        {"betas": (0.8, 0.95), "eps": 0.3},
        {"betas": (0.5, 0.3)},  # most maxima are of this step
        {"weight_decay": 0.3},
        {"weight_decay": 0.1, "maximize": True, "betas": (0.5, 0.3), "eps": 1e-3},
    ],
    Adadelta: [
        {"lr": 1.0},
        {"rho": 0.8, "eps": 1e-4},
        {"lr": 1.0, "rho": 0.8, "eps": 1e-4, "weight_decay": 0.3},
        {"lr": 1.0, "weight_decay": 0.9},
        {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
    ],
    ASGD: [
        {},
        {"lambd": 0.3, "alpha": 0.6, "t0": 3.0},
        {"lambd": 0.1, "weight_decay": 0.3, "maximize": True},
    ],
}  # fmt: skip
CASES = [(kind, {"lr": 0.01, **options}) for kind, options in OPTIONS.items() for options in options]
BACKENDS = [pytest.param("cpu", marks=needs_cpu_kernels), "reference"]


@pytest.fixture(autouse=True)
def _double_precision_step_counters() -> Any:
    """torch makes step counters in the default dtype; see test_adaptation.py."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tolerance(kind: Any, options: dict[str, Any], steps: int) -> float:
    """At a first step with a small eps, D is what rounding leaves of a difference of equals, 1e-8 of its terms."""
    sign_like = kind in (NAdam, RMSprop, Adamax) or (kind is Adagrad and "initial_accumulator_value" not in options)
    return 3e-6 if steps == 1 and sign_like and options.get("eps", 0.0) < 0.1 else 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"{CASES[i][0].__name__} {CASES[i][1]}")
def test_exact_is_the_derivative_of_torchs_own_step(case: int, steps: int, backend: str) -> None:
    kind, options = CASES[case]
    torch.manual_seed(1000 * case + steps)
    params, optimizer, before = stepped(kind, options, steps)
    d = [torch.randn_like(p) for p in params]
    expected = differentiated(kind, options, before, [p.grad for p in params], d)
    got, norm = adapted(optimizer, params, d, "exact", backend)
    allowed = tolerance(kind, options, steps)
    assert relative_error(torch.cat([x.flatten() for x in got]), torch.cat([x.flatten() for x in expected])) < allowed
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 100 * allowed
    assert relative_error(norm, torch.cat([b.flatten() for b in expected]).norm()) < allowed


# "paper"


def eps_free(kind: Any, options: dict[str, Any], state: dict[str, Any], g: Tensor, m: Tensor | None) -> Tensor:
    """D without eps in its numerator, by the quotient rule as one would write it down."""
    lr, eps, t = options["lr"], options.get("eps", 1e-8), state["step"].item()
    b1, b2 = options.get("betas", (0.9, 0.999))
    if kind is Adamax:
        n = state["exp_inf"]
        made = (n - g.abs() - eps).abs() < 1e-14 * n
        assert m is not None and made.any()
        without_eps = torch.where(made, g.abs(), n)
        return lr / (1 - b1**t) * ((1 - b1) * without_eps - m * g.sign() * made) / n**2
    if kind is NAdam:
        psi, product = options.get("momentum_decay", 4e-3), state["mu_product"].item()
        mu, after = (b1 * (1 - 0.5 * 0.96 ** (k * psi)) for k in (t, t + 1))
        own, mean = lr * (1 - mu) / (1 - product), lr * after / (1 - product * after)
        s = (state["exp_avg_sq"] / (1 - b2**t)).sqrt()
        assert m is not None
        top, dtop, ds = own * g + mean * m, own + mean * (1 - b1), (1 - b2) * g / (s * (1 - b2**t))
    elif kind is Adagrad:
        rate = lr / (1 + (t - 1) * options.get("lr_decay", 0.0))
        s = state["sum"].sqrt()
        top, dtop, ds = rate * g, rate, g / s
    else:
        omega = 1 - options.get("alpha", 0.99)
        mean = state["grad_avg"] if options.get("centered") else torch.zeros_like(g)
        s = (state["square_avg"] - mean**2).sqrt()
        top, dtop, ds = lr * g, lr, omega * (g - mean) / s
    q = s + eps
    return dtop * s / q**2 - top * ds / q**2


PAPER = [
    (NAdam, {"lr": 0.01, "eps": 1e-2, "momentum_decay": 0.05}),
    (Adagrad, {"lr": 0.01, "eps": 1e-2, "lr_decay": 0.1}),
    (RMSprop, {"lr": 0.01, "eps": 1e-2, "alpha": 0.9}),
    (RMSprop, {"lr": 0.01, "eps": 1e-2, "alpha": 0.9, "momentum": 0.5}),
    (RMSprop, {"lr": 0.01, "eps": 1e-2, "alpha": 0.9, "centered": True}),
    (Adamax, {"lr": 0.01, "eps": 1e-2, "betas": (0.8, 0.4)}),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "options"), PAPER, ids=str)
def test_paper_drops_eps_from_the_numerator_only(kind: Any, options: dict[str, Any], backend: str) -> None:
    torch.manual_seed(5)
    params, optimizer, _ = stepped(kind, options, 4)
    d = [torch.randn_like(p) for p in params]
    exact, _ = adapted(optimizer, params, d, "exact", backend)
    paper, _ = adapted(optimizer, params, d, "paper", backend)
    for p, x, a, b in zip(params, d, exact, paper, strict=True):
        state = optimizer.state[p]
        assert relative_error(b, eps_free(kind, options, state, p.grad, state.get("exp_avg")) * x) < 1e-11
        if p.numel() > 1:
            assert relative_error(b, a) > 1e-5  # the term is there to be dropped


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [5, 6])
def test_paper_and_exact_agree_on_radam_before_it_rectifies(steps: int, backend: str) -> None:
    """At step 6 its variance becomes tractable; until then nothing is divided, so there is no eps."""
    torch.manual_seed(6)
    params, optimizer, _ = stepped(RAdam, {"lr": 0.01, "eps": 1e-2}, steps)
    d = [torch.randn_like(p) for p in params]
    exact, paper = (adapted(optimizer, params, d, mode, backend)[0] for mode in ("exact", "paper"))
    for x, a, b in zip(d, exact, paper, strict=True):
        if steps == 5:
            assert torch.equal(a, b)
            assert relative_error(a, 0.01 * 0.1 / (1 - 0.9**5) * x) < 1e-14
        else:
            assert relative_error(a, b) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [NAdam, RAdam, Adagrad, RMSprop, Adamax])
@pytest.mark.parametrize("backend", BACKENDS)
def test_untouched_cells_count_for_nothing_under_paper(kind: Any, dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(7)
    p = torch.randn(6, dtype=dtype, requires_grad=True)
    optimizer = kind([p], lr=0.1)
    mask = torch.tensor([1, 1, 1, 0, 0, 0])
    for _ in range(7):
        p.grad = torch.randn_like(p) * mask
        optimizer.step()
    d = torch.randn_like(p).detach()
    (paper,), _ = adapted(optimizer, [p], [d], "paper", backend)
    (exact,), _ = adapted(optimizer, [p], [d], "exact", backend)
    assert (paper[3:] == 0).all() and (paper[:3] != 0).all()
    assert exact[3:].norm() > 1e3 * exact[:3].norm()  # slope / eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "options"), [(NAdam, {}), (Adagrad, {}), (RMSprop, {}), (RMSprop, {"centered": True}), (Adamax, {})]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sign_like_first_steps_are_exactly_zero_under_paper(
    kind: Any, options: dict[str, Any], dtype: torch.dtype, backend: str
) -> None:
    p = torch.randn(5000, dtype=dtype, requires_grad=True)
    optimizer = kind([p], lr=0.1, **options)
    p.grad = torch.randn_like(p) * torch.logspace(-6, 3, 5000).to(dtype)
    optimizer.step()
    (v,), norm = adapted(optimizer, [p], [torch.randn_like(p)], "paper", backend)
    assert norm == 0 and (v == 0).all()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_adadelta_leaves_out_only_the_cells_that_its_step_did_not_see(
    decay: float, maximize: bool, backend: str
) -> None:
    """There D = lr sqrt((e + eps) / (w + eps)), which is lr, far more than elsewhere, if no step ever saw the cell."""
    torch.manual_seed(8)
    p = torch.randn(9, requires_grad=True)
    with torch.no_grad():
        p[6:] = 0
    optimizer = Adadelta([p], lr=0.1, weight_decay=decay, maximize=maximize)
    for _ in range(4):  # cells 0 to 2 are seen by every step, 3 to 5 only by decay, 6 and 7 never, 8 not by the last
        p.grad = torch.randn_like(p)
        p.grad[3:8] = 0
        optimizer.step()
    with torch.no_grad():
        p[8] = 0
    p.grad[8] = 0
    optimizer.step()
    d = torch.rand_like(p) + 0.5
    (exact,), _ = adapted(optimizer, [p], [d], "exact", backend)
    (paper,), norm = adapted(optimizer, [p], [d], "paper", backend)
    unseen = p.grad == 0 if decay == 0 else (p.grad == 0) & (p == 0)
    assert unseen.sum() == (6 if decay == 0 else 3)
    assert torch.equal(paper, torch.where(unseen, 0.0, exact))
    assert relative_error(norm, paper.norm()) < 1e-13
    state = optimizer.state[p]
    rms = ((state["acc_delta"] / 0.9 + 1e-6) / (state["square_avg"] + 1e-6)).sqrt()
    sign = -1 if maximize else 1
    torch.testing.assert_close(exact[6:], (sign * 0.1 * rms * d)[6:], rtol=1e-13, atol=0)
    assert (exact[6:8].abs() > 30 * exact[:3].abs().max()).all()
