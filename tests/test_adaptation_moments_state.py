"""The optimizers of `adapt_norm_moments`: which step was made, weight decay at its limit, state layouts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import relative_error
from stepping import SHAPES, adapted, stepped
from test_adaptation_moments import BACKENDS, OPTIONS
from torch import Tensor, nn
from torch.optim import ASGD, Adadelta, Adagrad, Adamax, NAdam, RAdam, RMSprop

import sama_kernels as sk
from sama_kernels import adaptation, ops


@pytest.fixture(autouse=True)
def _double_precision_step_counters() -> Any:
    """torch makes step counters in the default dtype; see test_adaptation.py."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_asgd_uses_the_eta_of_the_step_under_a_scheduler(steps: int, tensor_lr: bool) -> None:
    """eta is made from the lr of the step before, by which time a scheduler has changed lr."""
    torch.manual_seed(steps)
    p = torch.randn(4, requires_grad=True)
    optimizer = ASGD([p], lr=torch.tensor(0.1) if tensor_lr else 0.1, lambd=0.2, alpha=0.6)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for _ in range(steps):
        p.grad, before = torch.randn_like(p), p.detach().clone()
        optimizer.step()
        scheduler.step()
    eta = (before - p.detach()) / (p.grad + 0.2 * before)
    d = torch.randn_like(p)
    (v,), _ = adapted(optimizer, [p], [d], "exact", "reference")
    assert relative_error(v, eta * d) < 1e-12


def test_asgd_without_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps made before the library was imported: eta by its closed form."""
    torch.manual_seed(1)
    params, optimizer, _ = stepped(ASGD, {"lr": 0.1, "lambd": 0.2, "alpha": 0.6}, 5)
    recorded, _ = adapted(optimizer, params, [torch.ones_like(p) for p in params], "exact", "reference")
    monkeypatch.setattr(adaptation.step_record, "_records", {})
    closed, _ = adapted(optimizer, params, [torch.ones_like(p) for p in params], "exact", "reference")
    for a, b in zip(closed, recorded, strict=True):
        assert relative_error(a, b) < 1e-14
        assert (a != 0.1).all()


def test_adagrad_before_its_first_step_has_no_state() -> None:
    """Its accumulators are there from the start."""
    p = torch.randn(3, requires_grad=True)
    optimizer = Adagrad([p], lr=0.1)
    p.grad = torch.randn(3)
    with pytest.raises(ValueError, match="it has no state for base_params yet"):
        adaptation.plan(optimizer, [p], "paper")


@pytest.mark.parametrize("kind", list(OPTIONS))
def test_parameters_that_the_step_left_out_do_not_move(kind: Any) -> None:
    used, unused, idle, unread = (torch.randn(3, requires_grad=True) for _ in range(4))
    optimizer = kind([unused, used, unread, idle], lr=0.1)
    for step in range(3):
        used.grad, unread.grad = torch.randn(3), torch.randn(3)
        idle.grad = torch.randn(3) if step < 2 else None
        optimizer.step()
    d = torch.randn(3)
    v: list[Tensor | None] = [d.clone(), d.clone(), d.clone(), None]
    adaptation.apply(adaptation.plan(optimizer, [used, unused, idle, unread], "exact"), v, "reference")
    assert [x is not None for x in v] == [True, False, False, False]
    alone, _ = adapted(optimizer, [used], [d], "exact", "reference")
    assert v[0] is not None and torch.equal(v[0], alone[0])  # the row of `used`, not of `unread`


# Weight decay where the step forgets theta


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cells_whose_step_forgets_theta_stay_bounded(dtype: torch.dtype, backend: str) -> None:
    """Where weight_decay lr = q, theta after the step does not depend on theta before it: nobody can have it back. What
    the second moment says about g bounds D in those cells; all others are right."""
    lr, decay, eps, alpha = 0.5, 1.0, 0.25, 0.75
    torch.manual_seed(4)
    distances = torch.cat([torch.zeros(50), torch.linspace(-1, 20, 1550).exp2() * torch.finfo(dtype).eps])
    s = (0.25 * (1 + distances * torch.randn_like(distances).sign())).to(dtype)  # q = s + eps passes 1/2
    w, q = s.square(), s.double() + eps
    g = (2 * torch.rand_like(q) - 1) * (w.double() / (1 - alpha)).sqrt()
    before = 30 * torch.randn_like(q)
    p = (before - lr * g / q).to(dtype).requires_grad_()
    p.grad = (g - decay * before).to(dtype)
    optimizer = RMSprop([p], lr=lr, weight_decay=decay, eps=eps, alpha=alpha)
    optimizer.state[p] = {"step": torch.tensor(9.0), "square_avg": w}
    (v,), norm = adapted(optimizer, [p], [torch.ones_like(p)], "exact", backend)
    right = lr / q - lr * (1 - alpha) * g.square() / (s.double() * q**2)
    largest = (lr / q).max()  # for g = 0
    assert v.isfinite().all() and norm.isfinite() and v.abs().max() <= 1.01 * largest
    known = distances > 1e4 * torch.finfo(dtype).eps
    assert ((v - right).abs()[known] <= 0.03 * largest).all()
    assert known.sum() > 400 and (~known).sum() > 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_adadelta_finds_theta_again_unless_decay_alone_takes_it_beyond_0(dtype: torch.dtype, backend: str) -> None:
    """Where decay takes c theta from a cell that gets no other gradient: right for c < 0.99, bounded beyond."""
    lr, decay, eps, rho = 2.0, 0.5, 1e-6, 0.9
    torch.manual_seed(4)
    c = torch.linspace(0.05, 2, 20_000)
    w = torch.logspace(-2, 2, 20_000)[torch.randperm(20_000)].to(dtype)
    kept = rho * (w.double() + eps)
    m = ((c / (lr * decay)).square() * kept - rho * eps).to(dtype)
    g = (2 * torch.rand_like(c) - 1) * (w.double() / (1 - rho)).sqrt()
    slope = ((m.double() + rho * eps) / (kept + (1 - rho) * g.square())).sqrt()  # delta / g
    before = 3 * torch.randn_like(c)
    p = (before - lr * slope * g).to(dtype).requires_grad_()
    p.grad = (g - decay * before).to(dtype)
    optimizer = Adadelta([p], lr=lr, weight_decay=decay, eps=eps, rho=rho)
    optimizer.state[p] = {"step": torch.tensor(9.0), "square_avg": w, "acc_delta": m}
    (v,), norm = adapted(optimizer, [p], [torch.ones_like(p)], "exact", backend)
    right = lr * slope * (1 - (1 - rho) * g.square() / (w.double() + eps))
    assert v.isfinite().all() and norm.isfinite() and (v.abs() <= 1.001 * c / decay).all()
    error = (v - right).abs()[c < 0.99] / right.abs().max()
    assert error.max() < (1e-3 if dtype == torch.float32 else 1e-11)


# Layouts of the state

TENSOR_LR = torch.tensor(0.01, dtype=torch.float64)
CAPTURABLE = [{"capturable": True, "foreach": f, **lr} for f in (False, True) for lr in ({}, {"lr": TENSOR_LR})]
LAYOUTS = {
    NAdam: CAPTURABLE, RAdam: CAPTURABLE, RMSprop: CAPTURABLE, Adamax: CAPTURABLE,
    Adadelta: CAPTURABLE, ASGD: CAPTURABLE,
    Adagrad: [{"fused": True}, {"fused": True, "lr": TENSOR_LR}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options"),
    [(k, o) for k in OPTIONS for o in ({"foreach": True}, {"foreach": False, "lr": TENSOR_LR}, *LAYOUTS[k])],
    ids=str,
)
@pytest.mark.parametrize("steps", [3, 8])
def test_every_layout_of_the_state_gives_the_same(
    kind: Any, options: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch takes capturable=True for accelerators only; its code, and the state it leaves, are the same on the CPU.
    module = sys.modules[kind.__module__]
    monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"], raising=False)
    results = []
    for extra in ({}, options):
        torch.manual_seed(3)
        params, optimizer, _ = stepped(kind, {"lr": 0.01, "weight_decay": 0.1, **extra}, steps)
        torch.manual_seed(4)
        v, norm = adapted(optimizer, params, [torch.randn_like(p) for p in params], "paper", "reference")
        results.append(torch.cat([*(x.flatten() for x in v), norm.reshape(1)]))
    assert relative_error(results[1], results[0]) < 1e-11


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "capturable"), [(k, c) for k in OPTIONS for c in (False, True) if (k, c) != (Adagrad, True)]
)
def test_layouts_on_a_gpu(kind: Any, capturable: bool) -> None:
    """Counters on the host and on the device (Adagrad has none there): the same v as on the CPU, without waiting."""
    extra: dict[str, Any] = {"capturable": True}
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(3)
        params = [torch.randn(s, device="cpu").to(device).requires_grad_() for s in SHAPES]
        options = extra if capturable and device == "cuda" else {}
        optimizer = kind(params, lr=0.01, weight_decay=0.1, **options)
        for _ in range(7):
            for p in params:
                p.grad = torch.randn(p.shape, device="cpu").to(device)
            optimizer.step()
        d = [torch.randn(p.shape, device="cpu").to(device) for p in params]
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            v, norm = adapted(optimizer, params, d, "paper", "auto" if device == "cpu" else "cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append(torch.cat([*(x.flatten() for x in v), norm.reshape(1)]).cpu())
    assert relative_error(results[1], results[0]) < 1e-9


def test_coefficients_of_device_counters_are_made_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number is read on the host: reading one from a tensor fails in this test."""
    plans: list[Callable[[], object]] = []
    for kind in (NAdam, RAdam, RMSprop, Adamax, Adadelta, ASGD):
        monkeypatch.setattr(
            sys.modules[kind.__module__], "_get_capturable_supported_devices", lambda *_, **__: ["cpu"], raising=False
        )
        params, optimizer, _ = stepped(kind, {"lr": TENSOR_LR, "capturable": True, "foreach": True}, 2)
        plans.append(lambda optimizer=optimizer, params=params: adaptation.plan(optimizer, params, "paper"))

    def fail(*_: object) -> Any:
        raise AssertionError("a number was read on the host")

    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "cpu"):
        monkeypatch.setattr(Tensor, name, fail)
    for plan in plans:
        (call,) = plan()  # type: ignore[misc]
        assert call.coefficients.shape == (len(SHAPES), ops.COEFFICIENTS)


def test_adamax_of_float64_with_a_float32_learning_rate() -> None:
    """torch rounds lr / (1 - beta1^t) to float32, by which it can be told which cells made their maximum now."""
    torch.manual_seed(0)
    start, grads, h = torch.randn(6).double(), [torch.randn(6).double() for _ in range(5)], 1e-6

    def after(last: Tensor) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        p = nn.Parameter(start.clone())
        optimizer = torch.optim.Adamax(
            [p], lr=torch.tensor(0.05, dtype=torch.float32), betas=(0.5, 0.77), weight_decay=0.1, foreach=False
        )
        for g in (*grads[:-1], last):
            p.grad = g.clone()
            optimizer.step()
        return p, optimizer

    moved = [after(grads[-1] - h * e)[0] - after(grads[-1] + h * e)[0] for e in torch.eye(6).double()]
    expected = torch.stack([m[i] for i, m in enumerate(moved)]) / (2 * h)  # D is diagonal
    p, optimizer = after(grads[-1])
    mu = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    out = sk.meta_grad(
        lambda: (p * mu).sum(), lambda: p.sum(), base_params=[p], meta_params=[mu], optimizer=optimizer,
        adaptation="exact", difference="exact",
    )  # fmt: skip
    torch.testing.assert_close(-out.grads[0], expected.detach(), rtol=1e-6, atol=1e-8)
