"""D of every optimizer configuration against float64 autograd through torch's own optimizer."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from problems import relative_error
from stepping import SHAPES, adapted, differentiated, stepped
from torch import Tensor

from sama_kernels import adaptation

ADAM = [
    {"lr": 0.01},
    {"lr": 0.003, "betas": (0.8, 0.95), "eps": 1e-3},
    {"lr": 0.01, "weight_decay": 0.3},
    {"lr": 0.01, "amsgrad": True},
    {"lr": 0.01, "maximize": True},
    {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
]
SGD = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.4},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.2},
    {"lr": 0.1, "momentum": 0.5, "dampening": 0.4, "weight_decay": 0.2, "maximize": True},
]
CASES = [(torch.optim.SGD, k) for k in SGD] + [(t, k) for t in (torch.optim.Adam, torch.optim.AdamW) for k in ADAM]
BACKENDS = ["reference", "cpu"]


@pytest.fixture(autouse=True)
def _double_precision_step_counters() -> Any:
    """torch makes step counters in the default dtype and, under differentiable=True, computes beta^t in it: in
    float32 that alone is off by 1e-5 at step 2."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_exact_is_the_derivative_of_torchs_own_step(case: int, steps: int, backend: str) -> None:
    optimizer_type, options = CASES[case]
    torch.manual_seed(1000 * case + steps)
    params, optimizer, before = stepped(optimizer_type, options, steps)
    d = [torch.randn_like(p) for p in params]
    expected = differentiated(optimizer_type, options, before, [p.grad for p in params], d)
    got, norm = adapted(optimizer, params, d, "exact", backend)
    # At Adam's first step D is what rounding leaves of a difference of equals, 1e-8 of its terms: 1e-7 relative.
    tolerance = 3e-7 if steps == 1 else 1e-11
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < tolerance
    assert relative_error(norm, torch.cat([b.flatten() for b in expected]).norm()) < tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer_type", [torch.optim.Adam, torch.optim.AdamW])
def test_paper_drops_only_the_epsilon_term(optimizer_type: Any, backend: str) -> None:
    """ "paper" is "exact" minus lr (1 - beta1) eps / (c1 q^2) d, computed here from the state."""
    torch.manual_seed(5)
    options = {"lr": 0.01, "eps": 1e-2}
    params, optimizer, _ = stepped(optimizer_type, options, 4)
    d = [torch.randn_like(p) for p in params]
    exact, _ = adapted(optimizer, params, d, "exact", backend)
    paper, _ = adapted(optimizer, params, d, "paper", backend)
    for p, x, a, b in zip(params, d, exact, paper, strict=True):
        q = (optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**4)).sqrt() + 1e-2
        epsilon_term = 0.01 / (1 - 0.9**4) * 0.1 * 1e-2 / q**2 * x
        assert relative_error(b, a - epsilon_term) < 1e-12
        assert relative_error(b, a) > 1e-4  # the term is there to be dropped


@pytest.mark.parametrize("backend", BACKENDS)
def test_untouched_cells_count_for_nothing_under_paper(backend: str) -> None:
    p = torch.randn(6, dtype=torch.float32, requires_grad=True)
    optimizer = torch.optim.Adam([p], lr=0.1)
    mask = torch.tensor([1, 1, 1, 0, 0, 0])
    for _ in range(3):
        p.grad = torch.randn_like(p) * mask
        optimizer.step()
    d = torch.randn_like(p).detach()
    (paper,), _ = adapted(optimizer, [p], [d], "paper", backend)
    (exact,), _ = adapted(optimizer, [p], [d], "exact", backend)
    assert (paper[3:] == 0).all() and (paper[:3] != 0).all()
    c1 = 1 - 0.9**3
    torch.testing.assert_close(exact[3:], 0.1 * 0.1 / (c1 * 1e-8) * d[3:], rtol=1e-5, atol=0.0)
    assert exact[3:].norm() > 1e3 * exact[:3].norm()  # why "paper" is the default


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_first_step_of_adam_is_exactly_zero_under_paper(dtype: torch.dtype, backend: str) -> None:
    p = torch.randn(5000, dtype=dtype, requires_grad=True)
    optimizer = torch.optim.Adam([p], lr=0.1)
    p.grad = torch.randn_like(p) * torch.logspace(-6, 3, 5000).to(dtype)
    optimizer.step()
    (v,), norm = adapted(optimizer, [p], [torch.randn_like(p)], "paper", backend)
    assert norm == 0 and (v == 0).all()


TENSOR_LR = torch.tensor(0.01, dtype=torch.float64)
LAYOUTS = [
    {"foreach": True},
    {"foreach": False},
    {"fused": True},
    {"lr": TENSOR_LR},
    {"capturable": True, "foreach": False},
    {"capturable": True, "foreach": True},
    {"capturable": True, "foreach": True, "lr": TENSOR_LR},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize("optimizer_type", [torch.optim.Adam, torch.optim.AdamW])
def test_every_layout_of_the_state_gives_the_same(
    optimizer_type: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch takes capturable=True for accelerators only; its code, and the state it leaves, are the same on the CPU.
    module = sys.modules["torch.optim.adam"]  # torch.optim hides the name
    monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
    results = []
    for extra in ({}, options):
        torch.manual_seed(3)
        params, optimizer, _ = stepped(optimizer_type, {"lr": 0.01, "weight_decay": 0.1, **extra}, 3)
        torch.manual_seed(4)
        v, norm = adapted(optimizer, params, [torch.randn_like(p) for p in params], "paper", "cpu")
        results.append(torch.cat([*(x.flatten() for x in v), norm.reshape(1)]))
    assert relative_error(results[1], results[0]) < 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}], ids=str)
def test_layouts_on_a_gpu(options: dict[str, Any]) -> None:
    """Step counters on the host, on the device, and made by a capturable optimizer: the same v as on the CPU."""
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(3)
        params = [torch.randn(s, device="cpu").to(device).requires_grad_() for s in SHAPES]
        optimizer = torch.optim.Adam(params, lr=0.01, weight_decay=0.1, **(options if device == "cuda" else {}))
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, device="cpu").to(device)
            optimizer.step()
        d = [torch.randn(p.shape, device="cpu").to(device) for p in params]
        v, norm = adapted(optimizer, params, d, "paper", "reference")
        results.append(torch.cat([*(x.flatten() for x in v), norm.reshape(1)]).cpu())
    assert relative_error(results[1], results[0]) < 1e-6


def test_tensor_lr_of_sgd() -> None:
    p = torch.randn(5, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=torch.tensor(0.25), momentum=0.9)
    p.grad = torch.randn(5)
    optimizer.step()
    d = torch.randn(5)
    (v,), _ = adapted(optimizer, [p], [d], "paper", "cpu")
    torch.testing.assert_close(v, 0.25 * d)


def test_groups_keep_their_own_hyperparameters() -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.02, "betas": (0.5, 0.9)}])
    alone = [
        torch.optim.Adam([a.detach().clone().requires_grad_()], lr=0.1),
        torch.optim.Adam([b.detach().clone().requires_grad_()], lr=0.02, betas=(0.5, 0.9)),
    ]
    for _ in range(3):
        for p, other in zip((a, b), alone, strict=True):
            p.grad = torch.randn_like(p)
            other.param_groups[0]["params"][0].grad = p.grad.clone()
            other.step()
        optimizer.step()
    d = [torch.randn_like(a), torch.randn_like(b)]
    together, norm = adapted(optimizer, [b, a], [d[1], d[0]], "exact", "cpu")  # another order than the optimizer's
    for got, other, x in zip(reversed(together), alone, d, strict=True):
        (expected,), _ = adapted(other, other.param_groups[0]["params"], [x], "exact", "cpu")
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(norm, torch.cat(together).norm())


@pytest.mark.parametrize("kind", ["float", "tensor", "onecycle"])
def test_scheduler_after_the_step_does_not_change_d(kind: str) -> None:
    torch.manual_seed(0)
    p = torch.randn(8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([p], lr=torch.tensor(0.1) if kind == "tensor" else 0.1)
    scheduler: Any = (
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=10)
        if kind == "onecycle"
        else torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.1)
    )
    d = torch.randn(8, dtype=torch.float64)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
        (before,), _ = adapted(optimizer, [p], [d], "exact", "cpu")
        scheduler.step()
        (after,), _ = adapted(optimizer, [p], [d], "exact", "cpu")
        assert torch.equal(before, after)


@pytest.mark.parametrize("optimizer_type", [torch.optim.Adam, torch.optim.SGD])
def test_parameters_that_the_step_left_out_do_not_move(optimizer_type: Any) -> None:
    """Never used (no state), or used before but not in the last step (an expert that got no token): u = 0, so D = 0."""
    used, unused, idle = (torch.randn(3, requires_grad=True) for _ in range(3))
    optimizer = optimizer_type([used, unused, idle], lr=0.1)
    for step in range(3):
        used.grad = torch.randn(3)
        idle.grad = torch.randn(3) if step < 2 else None
        optimizer.step()
    v: list[Tensor | None] = [torch.randn(3), torch.randn(3), torch.randn(3)]
    adaptation.apply(adaptation.plan(optimizer, [used, unused, idle], "paper"), v, "cpu")
    assert [x is not None for x in v] == [True, False, False]
