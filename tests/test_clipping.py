"""Gradient clipping before the step, against float64 autograd through the clipping and the optimizer itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from clipped import (
    SHAPES,
    adapted_through_meta_grad,
    clip_by_norm,
    clipped_steps,
    differentiable_step,
    differentiated_with_clipping,
)
from op_cases import SEED
from problems import direct_gradient, flat, meta_grad, mixed_derivative, relative_error, same_bits, weight_net
from stepping import adapted
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import sama_kernels as sk

OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    (torch.optim.Adam, {"lr": 0.01}),
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.2}),
    (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.3}),  # L2
]
BACKENDS = ["reference", "cpu"]
MAX_NORM = 0.7


@pytest.fixture(autouse=True)
def fresh_inputs() -> Iterator[None]:
    """Other random inputs in every run; pytest shows the printed line when a test fails. And step counters in float64,
    because torch computes beta^t in their dtype under differentiable=True."""
    print(f"repeat with SAMA_TEST_SEED={SEED}")
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_norm(params: list[Tensor]) -> Tensor:
    return sk.clip_coef(clip_grad_norm_(params, MAX_NORM), MAX_NORM)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank_one", [False, True])
@pytest.mark.parametrize("steps", [2, 10])
@pytest.mark.parametrize("case", range(len(OPTIMIZERS)))
def test_clipping_by_norm(case: int, steps: int, rank_one: bool, backend: str) -> None:
    optimizer_type, options = OPTIMIZERS[case]
    params, optimizer, before, raw, coef = clipped_steps(optimizer_type, options, steps, by_norm)
    assert coef < 0.5
    d = [torch.randn_like(p).detach() for p in params]
    clip = partial(clip_by_norm, max_norm=MAX_NORM, through_norm=rank_one)
    expected = differentiated_with_clipping(optimizer_type, options, before, raw, d, clip)
    got, out = adapted_through_meta_grad(
        params, optimizer, d, clip_coef=coef, clip_rank_one=rank_one, backend=backend, alpha=0.25
    )
    assert relative_error(flat(got), flat(expected)) < 1e-10
    assert relative_error(out.norm, flat(expected).norm()) < 1e-10
    assert relative_error(out.epsilon * out.norm, torch.tensor(0.25)) < 1e-14
    other = differentiated_with_clipping(
        optimizer_type, options, before, raw, d, partial(clip, through_norm=not rank_one)
    )
    assert (
        relative_error(flat(got), flat(other)) > 1e-6
    )  # the two differ, in some draws by little: one cell may hold most of v


@pytest.mark.parametrize("case", range(len(OPTIMIZERS)))
def test_no_clipping_changes_nothing(case: int) -> None:
    """With c = 1 not a bit, with or without the norm's derivative; numbers above 1 count as 1, as in torch."""
    params, optimizer, *_ = clipped_steps(*OPTIMIZERS[case], 3, lambda params: None)
    d = [torch.randn_like(p).detach() for p in params]
    _, plain = adapted_through_meta_grad(params, optimizer, d)
    for coef in (1.0, torch.tensor(1.0), sk.clip_coef(torch.tensor(0.3), 1.0), torch.tensor([1.7])):
        for rank_one in (False, True):
            _, out = adapted_through_meta_grad(params, optimizer, d, clip_coef=coef, clip_rank_one=rank_one)
            assert relative_error(out.norm, plain.norm) < 1e-15
            for a, b in zip(out.grads, plain.grads, strict=True):
                assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", range(len(OPTIMIZERS)))
def test_clipping_by_value(case: int, backend: str) -> None:
    optimizer_type, options = OPTIMIZERS[case]
    params, optimizer, before, raw, _ = clipped_steps(optimizer_type, options, 3, lambda p: clip_grad_value_(p, 0.5))
    assert 0 < sum(int((g.abs() > 0.5).sum()) for g in raw) < 20
    d = [torch.randn_like(p).detach() for p in params]
    expected = differentiated_with_clipping(
        optimizer_type, options, before, raw, d, lambda grads: [g.clamp(-0.5, 0.5) for g in grads]
    )
    got, out = adapted_through_meta_grad(params, optimizer, d, clip_value=0.5, backend=backend)
    assert relative_error(flat(got), flat(expected)) < 1e-10
    assert relative_error(out.norm, flat(expected).norm()) < 1e-12


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clipped_values_are_found_in_every_dtype(dtype: torch.dtype, value: float) -> None:
    """0.7 rounds down to bfloat16 and float32: the clipped gradient is then below the bound."""
    p = torch.zeros(4, dtype=dtype, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=1.0)
    p.grad = torch.tensor([2.0, -2.0, value / 2, 0.0], dtype=dtype)
    clip_grad_value_([p], value)
    optimizer.step()
    lam = torch.zeros(4, requires_grad=True)
    out = sk.meta_grad(
        lambda: (lam * p.double()).sum(), lambda: p.double().sum(), base_params=[p], meta_params=[lam],
        optimizer=optimizer, clip_value=value,
    )  # fmt: skip
    assert ((out.grads[0] == 0) == torch.tensor([True, True, False, False])).all()


def test_through_one_unrolled_step() -> None:
    """lambda -> g -> clip -> Adam -> L_meta, differentiated by autograd as one graph; with the base loss linear in
    theta plus a part without lambda, the mixed derivative is the same before and after the step."""
    a = [torch.randn(s) for s in SHAPES]
    lam = (1 + torch.rand(3)).requires_grad_()
    for optimizer_type, options in OPTIMIZERS:
        params, optimizer, _, _, _ = clipped_steps(optimizer_type, options, 4, by_norm)

        def base_loss(params: list[Tensor]) -> Tensor:
            return sum(
                ((k**2 * x * p + 0.1 * p**4).sum() for k, x, p in zip(lam, a, params, strict=True)), torch.zeros(())
            )

        def meta_loss(params: list[Tensor]) -> Tensor:
            return sum(((p - 1).square().sum() for p in params), torch.zeros(()))

        before = ([p.detach().clone() for p in params], optimizer.state_dict())
        start = [p.detach().clone().requires_grad_() for p in params]
        g = list(torch.autograd.grad(base_loss(start), start, create_graph=True))
        moved = differentiable_step(optimizer_type, options, before, clip_by_norm(g, MAX_NORM, through_norm=True))
        (exact,) = torch.autograd.grad(meta_loss(moved), lam)

        optimizer.zero_grad()
        base_loss(params).backward(inputs=params)  # type: ignore[no-untyped-call]
        coef = by_norm(params)
        optimizer.step()
        assert coef < 0.9
        out = sk.meta_grad(
            partial(base_loss, params), partial(meta_loss, params), base_params=params, meta_params=[lam],
            optimizer=optimizer, adaptation="exact", alpha=1e-3, clip_coef=coef, clip_rank_one=True,
        )  # fmt: skip
        assert relative_error(out.grads[0], exact) < 1e-9


@pytest.mark.parametrize("rank_one", [False, True])
@pytest.mark.parametrize("case", range(len(OPTIMIZERS)))
def test_end_to_end_against_double_backward(case: int, rank_one: bool) -> None:
    problem = weight_net(seed=SEED % 1000)
    optimizer = OPTIMIZERS[case][0](problem.theta, **OPTIMIZERS[case][1])
    for _ in range(3):
        optimizer.zero_grad()
        problem.base_loss().backward()  # type: ignore[no-untyped-call]
        total = clip_grad_norm_(problem.theta, 0.02)
        optimizer.step()
    coef = sk.clip_coef(total, 0.02)
    assert coef < 1
    v, _ = adapted(optimizer, list(problem.theta), list(direct_gradient(problem)), "exact", "reference")
    if rank_one:  # c (x - ghat <ghat, x> n / (n + 1e-6)), on one long vector
        g, x = flat([p.grad for p in problem.theta if p.grad is not None]), flat(v)
        x = x - g * (g @ x) / (g @ g) * total / (total + 1e-6)
        v = [
            part.view_as(p) for part, p in zip(x.split([p.numel() for p in problem.theta]), problem.theta, strict=True)
        ]
    problem.base_loss()
    exact = mixed_derivative(problem, tuple(coef * x for x in v))
    out = meta_grad(problem, optimizer, adaptation="exact", alpha=1e-4, clip_coef=coef, clip_rank_one=rank_one)
    assert relative_error(flat(out.grads), exact) < 1e-6


def test_the_norm_ties_parameters_that_the_meta_loss_does_not_read() -> None:
    params, optimizer, before, raw, coef = clipped_steps(*OPTIMIZERS[1], 3, by_norm)
    d = [torch.randn_like(params[0]).detach(), None, torch.randn_like(params[2]).detach()]
    dense = [torch.zeros(()) if x is None else x for x in d]
    clip = partial(clip_by_norm, max_norm=MAX_NORM, through_norm=True)
    expected = differentiated_with_clipping(*OPTIMIZERS[1], before, raw, dense, clip)
    got, _ = adapted_through_meta_grad(params, optimizer, d, clip_coef=coef, clip_rank_one=True)
    assert expected[1] != 0 and relative_error(flat(got), flat(expected)) < 1e-10


def test_parameters_that_sat_the_step_out_are_not_part_of_the_norm() -> None:
    torch.manual_seed(SEED)
    used, idle = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    optimizer = torch.optim.Adam([used, idle], lr=0.1)
    for step in range(3):
        used.grad, idle.grad = torch.randn(5).sign() + torch.randn(5) / 9, torch.randn(5) if step < 2 else None
        coef = by_norm([used, idle])
        optimizer.step()
    d = [torch.randn(5), torch.randn(5)]
    options: dict[str, Any] = {"clip_coef": coef, "clip_rank_one": True}
    both, _ = adapted_through_meta_grad([used, idle], optimizer, d, **options)
    alone, _ = adapted_through_meta_grad([used], optimizer, d[:1], **options)
    assert coef < 1 and relative_error(both[0], alone[0]) < 1e-12 and (both[1] == 0).all()


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 3.7, 100.0])
def test_clip_coef_is_what_torch_multiplies_by(max_norm: float) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        p = torch.zeros(50, dtype=dtype, requires_grad=True)
        p.grad = torch.randn(50).to(dtype)
        raw = p.grad.clone()
        coef = sk.clip_coef(clip_grad_norm_([p], max_norm), max_norm)
        assert coef.shape == () and same_bits(p.grad, raw * coef)


@pytest.mark.parametrize("rank_one", [False, True])
@pytest.mark.parametrize("total_norm", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_is_degenerate(total_norm: float, rank_one: bool) -> None:
    params, optimizer, *_ = clipped_steps(*OPTIMIZERS[0], 2, by_norm)
    before = [p.detach().clone() for p in params]
    d = [torch.randn_like(p).detach() for p in params]
    coef = sk.clip_coef(torch.tensor(total_norm), 1.0)
    _, out = adapted_through_meta_grad(params, optimizer, d, clip_coef=coef, clip_rank_one=rank_one, update_base=True)
    assert out.degenerate and out.epsilon == 0 and all((g == 0).all() for g in out.grads)
    assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rank_one_term_in_lower_precision(dtype: torch.dtype) -> None:
    """||v|| after taking the part along g away, against float64 from the same numbers."""
    p = torch.randn(1000, dtype=dtype, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=1.0)
    p.grad = torch.randn(1000, dtype=dtype)
    coef = by_norm([p])
    optimizer.step()
    g, d = p.grad.double(), (torch.randn(1000) + 3 * p.grad.double()).to(dtype)
    x = d.double() - g * (g @ d.double()) / (g @ g)
    results = []
    lam = torch.zeros(1000, requires_grad=True)
    for _ in range(2):
        out = sk.meta_grad(
            lambda: (lam * p).sum(), lambda: (d * p).sum(), base_params=[p], meta_params=[lam],
            optimizer=optimizer, clip_coef=coef, clip_rank_one=True,
        )  # fmt: skip
        results.append(out.norm)
    assert results[0] == results[1]
    assert relative_error(results[0], coef.double() * x.norm()) < (1e-5 if dtype == torch.float32 else 3e-3)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"clip_coef": 0.0}, ValueError, "clip_coef: must be positive and finite, got 0"),
    ({"clip_coef": float("nan")}, ValueError, "clip_coef: must be positive and finite"),
    ({"clip_coef": "1"}, TypeError, "clip_coef: expected a number, got str"),
    ({"clip_coef": torch.ones(2)}, ValueError, r"clip_coef: expected one floating-point number, got .* \(2,\)"),
    ({"clip_coef": torch.tensor(1)}, ValueError, "clip_coef: expected one floating-point number, got torch.int64"),
    ({"clip_rank_one": True}, ValueError, r"clip_rank_one: .*sk\.clip_coef"),
    ({"clip_value": -1.0}, ValueError, "clip_value: must be positive and finite"),
    ({"clip_value": torch.tensor(1.0)}, TypeError, "clip_value: expected a number, got Tensor"),
    ({"clip_value": 1.0, "clip_coef": 0.5}, ValueError, "clip_value, clip_coef: only one kind of clipping"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=lambda x: str(x)[:40])
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    params, optimizer, *_ = clipped_steps(*OPTIMIZERS[1], 2, by_norm)
    with pytest.raises(error, match=message):
        adapted_through_meta_grad(params, optimizer, [torch.ones_like(p).detach() for p in params], **options)


@pytest.mark.parametrize("options", [{"clip_coef": 0.5, "clip_rank_one": True}, {"clip_value": 1.0}], ids=str)
def test_gradients_that_are_needed_and_gone(options: dict[str, Any]) -> None:
    params, optimizer, *_ = clipped_steps(*OPTIMIZERS[0], 2, by_norm)  # SGD: D itself does not read them
    d = [torch.ones_like(p).detach() for p in params]
    params[1].grad = torch.ones(())
    with pytest.raises(ValueError, match=r"base_params: the \.grad of tensor 1 .* was changed or replaced"):
        adapted_through_meta_grad(params, optimizer, d, **options)
    params[1].grad = None
    with pytest.raises(ValueError, match=r"base_params: tensor 1 .* has no \.grad"):
        adapted_through_meta_grad(params, optimizer, d, **options)
    with pytest.raises(ValueError, match="max_norm: must be positive"):
        sk.clip_coef(torch.tensor(1.0), 0.0)
