"""The optimizers without a fused kernel against float64 derivatives of the steps that they really make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import flat, relative_error, same_bits
from stepping import adapted, differenced, stepped
from torch import Tensor

import sama_kernels as sk
from sama_experiments.common.memory import peak_bytes
from sama_kernels import adaptation

MIXED = [(3, 4), (), (7,), (2, 5, 3)]
MATRICES = [(3, 5), (5, 3), (4, 4), (1, 6)]
ADAFACTOR = [
    {},
    {"lr": 0.05, "weight_decay": 0.2, "d": 1.5, "eps": (None, 0.5)},
    {"lr": 0.3, "beta2_decay": -0.5, "eps": (1e-2, 1e-3), "maximize": True},
    {"foreach": True, "weight_decay": 0.1},
]
MUON = [
    {},
    {"lr": 0.1, "momentum": 0.7, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
    {"lr": 0.1, "weight_decay": 0.3, "ns_steps": 3, "adjust_lr_fn": "original"},
]
TRANSFORMERS_ADAFACTOR = [
    {},
    {"lr": 0.05, "relative_step": False, "scale_parameter": False, "weight_decay": 0.1, "clip_threshold": 0.5},
    {"warmup_init": True, "beta1": 0.8, "weight_decay": 0.1},
    {"lr": 0.05, "relative_step": False, "beta1": 0.9, "decay_rate": -0.6},
]


def _cases() -> list[Any]:
    cases = [
        *((torch.optim.Adafactor, options, MIXED) for options in ADAFACTOR),
        *((torch.optim.Muon, options, MATRICES) for options in MUON),
        *(("transformers", options, MIXED) for options in TRANSFORMERS_ADAFACTOR),
    ]
    return [pytest.param(*c, id=f"{getattr(c[0], '__name__', c[0])}-{i}") for i, c in enumerate(cases)]


def _type(found: Any) -> Any:
    return pytest.importorskip("transformers").Adafactor if found == "transformers" else found


@pytest.fixture
def unrounded_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own Newton-Schulz iteration in the dtype of the gradient instead of bfloat16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


@pytest.mark.usefixtures("unrounded_muon")
@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
@pytest.mark.parametrize(("found", "options", "shapes"), _cases())
def test_exact_is_the_derivative_of_the_real_step(found: Any, options: Any, shapes: Any, steps: int) -> None:
    optimizer_type = _type(found)
    torch.manual_seed(steps)
    params, optimizer, before = stepped(optimizer_type, options, steps, shapes)
    d = [torch.randn_like(p) for p in params]
    grads = [p.grad for p in params]
    h = 1e-4 if optimizer_type is torch.optim.Muon else 1e-3
    expected = differenced(optimizer_type, options, before, grads, d, h)
    rtol, atol = 1e-8, 1e-11  # the truncation of the differences, and the rounding of theta over h
    got, norm = adapted(optimizer, params, d, "exact", "reference")
    scale = torch.cat([x.flatten() for x in expected]).norm()
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() < rtol * scale + atol
    assert (norm - scale).abs() < rtol * scale + atol


@pytest.mark.usefixtures("unrounded_muon")
@pytest.mark.parametrize(("found", "options", "shapes"), _cases())
def test_paper_leaves_out_the_cells_that_the_step_did_not_see(found: Any, options: Any, shapes: Any) -> None:
    optimizer_type = _type(found)
    torch.manual_seed(7)
    params, optimizer, _ = stepped(optimizer_type, {**options, "weight_decay": 0.0}, 1, shapes)
    optimizer.state.clear()
    unseen = [torch.rand_like(p) < 0.4 for p in params]
    for _ in range(3):
        for p, mask in zip(params, unseen, strict=True):
            p.grad = torch.where(mask, 0.0, torch.randn_like(p))
        optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.step()  # u = 0 too, where the cells of a matrix are not mixed
    d = [torch.randn_like(p) for p in params]
    exact, _ = adapted(optimizer, params, d, "exact", "cpu")
    paper, norm = adapted(optimizer, params, d, "paper", "cpu")
    left_out = 0
    for p, old, mask, a, b in zip(params, before, unseen, exact, paper, strict=True):
        zeroed = mask & (p.detach() == old)
        left_out += int(zeroed.sum())
        assert torch.equal(b, torch.where(zeroed, 0.0, a))
    assert relative_error(norm, torch.cat([x.flatten() for x in paper]).norm()) < 1e-13
    if optimizer_type is not torch.optim.Muon:
        assert left_out == sum(int(mask.sum()) for mask in unseen)


def test_untouched_rows_are_why_paper_is_the_default() -> None:
    """Adafactor divides by eps there: D is lr / eps, and nothing else would be left of v."""
    torch.manual_seed(0)
    table = torch.randn(20, 8, requires_grad=True)
    optimizer = torch.optim.Adafactor([table])
    for _ in range(3):
        table.grad = torch.randn(20, 8)
        table.grad[10:] = 0
        optimizer.step()
    d = torch.randn(20, 8)
    (exact,), _ = adapted(optimizer, [table], [d], "exact", "reference")
    (paper,), _ = adapted(optimizer, [table], [d], "paper", "reference")
    assert (paper[10:] == 0).all() and (paper[:10] == exact[:10]).all()
    assert exact[10:].norm() > 1e4 * exact[:10].norm()


def test_muon_as_torch_rounds_it() -> None:
    """Differences of the step in bfloat16, wide enough to see over its rounding, point the same way."""
    torch.manual_seed(1)
    params, optimizer, before = stepped(torch.optim.Muon, {"lr": 0.1}, 3, [(6, 8)])
    d = [torch.randn_like(p) for p in params]
    expected = differenced(torch.optim.Muon, {"lr": 0.1}, before, [p.grad for p in params], d, h=0.5)
    got, _ = adapted(optimizer, params, d, "exact", "reference")
    assert torch.nn.functional.cosine_similarity(got[0].flatten(), expected[0].flatten(), dim=0) > 0.95


@pytest.mark.parametrize(("found", "options", "shapes"), _cases())
def test_state_and_gradients_are_only_read(found: Any, options: Any, shapes: Any) -> None:
    params, optimizer, _ = stepped(_type(found), options, 2, shapes)
    tensors = [x for p in params for x in (p, p.grad, *optimizer.state[p].values()) if isinstance(x, Tensor)]
    before, versions = [x.detach().clone() for x in tensors], [x._version for x in tensors]
    adapted(optimizer, params, [torch.randn_like(p) for p in params], "paper", "cpu")
    for x, old, version in zip(tensors, before, versions, strict=True):
        assert same_bits(x, old) and x._version == version
    assert all(p.grad.grad_fn is None and not p.grad.requires_grad for p in params)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize(("found", "options", "shapes"), _cases())
def test_nothing_is_copied_to_the_host(found: Any, options: Any, shapes: Any, tensor_lr: bool) -> None:
    """Run on tensors without data, of which no number can be read."""
    params, optimizer, _ = stepped(_type(found), options, 2, shapes)
    plan = adaptation.plan(optimizer, params, "paper")

    def empty(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: empty(value) for key, value in x.items()}
        return torch.empty_like(x, device="meta") if isinstance(x, Tensor) else x

    for call in plan:
        if tensor_lr and call.options["hyper"]["lr"] is not None:
            call.options["hyper"]["lr"] = torch.empty((), device="meta")
        call.lists = tuple([empty(x) for x in entries] for entries in call.lists)
    v: list[Any] = [empty(p.detach()) for p in params]
    norm_sqs = adaptation.apply(plan, v, "reference")
    with pytest.raises(RuntimeError, match="meta"):  # so that a read would have been noticed
        norm_sqs[0].item()


@pytest.mark.gpu
@pytest.mark.parametrize(("found", "options", "shapes"), _cases())
def test_on_a_gpu_without_waiting_for_it(found: Any, options: Any, shapes: Any) -> None:
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(5)
        params = [torch.randn(s).to(device).requires_grad_() for s in shapes]
        optimizer = _type(found)(params, **options)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape).to(device)
            optimizer.step()
        d = [torch.randn(p.shape).to(device) for p in params]
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            v, norm = adapted(optimizer, params, d, "paper", "reference")
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        results.append(torch.cat([*(x.flatten() for x in v), norm.reshape(1)]).cpu())
    # The steps themselves differ by rounding, those of Muon by that of its bfloat16 iteration only in theta.
    assert relative_error(results[1], results[0]) < 1e-4


# Without nesterov=False, which is refused (the next test).
@pytest.mark.parametrize(
    ("found", "options", "shapes"), [c for c in _cases() if c.values[1].get("nesterov") is not False]
)
def test_bfloat16_parameters(found: Any, options: Any, shapes: Any) -> None:
    """v is that of float64 arithmetic on the same numbers, rounded once."""
    optimizer_type = _type(found)
    options = {**options, **({"eps": (1e-3, 1e-3)} if optimizer_type is torch.optim.Adafactor else {})}
    torch.manual_seed(3)
    params = [torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    optimizer = optimizer_type(params, **options)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    wide = [p.detach().double().requires_grad_() for p in params]
    reference = optimizer_type(wide, **options)
    for p, q in zip(params, wide, strict=True):
        q.grad = p.grad.double()
        state = optimizer.state[p].items()
        reference.state[q] = {k: x.double() if isinstance(x, Tensor) else x for k, x in state}
    d = [torch.randn_like(p) for p in params]
    got, norm = adapted(optimizer, params, d, "exact", "reference")
    expected, wide_norm = adapted(reference, wide, [x.double() for x in d], "exact", "reference")
    assert relative_error(norm, wide_norm) < 1e-5
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() < 2**-8 * b.norm() + 1e-5 * wide_norm


def test_muon_without_nesterov_on_bfloat16_is_refused() -> None:
    """torch normalises the momentum buffer in place there: what the step saw is gone."""
    fine, p = (torch.randn(3, 4, dtype=dtype, requires_grad=True) for dtype in (torch.float16, torch.bfloat16))
    optimizer = torch.optim.Muon([fine, p], nesterov=False, momentum=0.5)
    fine.grad, p.grad = torch.randn_like(fine), torch.randn_like(p)
    optimizer.step()
    assert abs(optimizer.state[p]["momentum_buffer"].norm() - 1) < 0.02  # and not half of the gradient's norm
    message = (
        r"optimizer: with nesterov=False .*Muon .*\(base_params tensor 1\).*use nesterov=True.*adaptation=\"none\""
    )
    with pytest.raises(ValueError, match=message):
        adaptation.plan(optimizer, [fine, p], "paper")
    assert adaptation.plan(optimizer, [fine], "paper")


@pytest.mark.parametrize("found", [torch.optim.Adafactor, torch.optim.Muon, "transformers"])
def test_lr_is_that_of_the_step(found: Any) -> None:
    options = {"lr": 0.1, "relative_step": False} if found == "transformers" else {"lr": 0.1}
    params, optimizer, _ = stepped(_type(found), options, 3, [(3, 4)])
    d = [torch.randn_like(p) for p in params]
    before, _ = adapted(optimizer, params, d, "exact", "reference")
    optimizer.param_groups[0]["lr"] = 0.01
    after, _ = adapted(optimizer, params, d, "exact", "reference")
    assert torch.equal(before[0], after[0])


def test_parameters_that_the_step_left_out_do_not_move() -> None:
    used, idle, unused = (torch.randn(3, requires_grad=True) for _ in range(3))
    optimizer = torch.optim.Adafactor([used, idle, unused])
    for step in range(3):
        used.grad = torch.randn(3)
        idle.grad = torch.randn(3) if step < 2 else None
        optimizer.step()
    v: list[Tensor | None] = [torch.randn(3), torch.randn(3), torch.randn(3)]
    adaptation.apply(adaptation.plan(optimizer, [used, idle, unused], "paper"), v, "cpu")
    assert [x is not None for x in v] == [True, False, False]


def test_steps_that_nobody_saw() -> None:
    """A state from a checkpoint is enough; parameters without one, such as those of a new group, do not move."""
    params, optimizer, _ = stepped(torch.optim.Adafactor, {}, 3, [(3,)])
    d = [torch.randn_like(p) for p in params]
    expected, _ = adapted(optimizer, params, d, "exact", "reference")
    resumed = torch.optim.Adafactor(params)
    resumed.load_state_dict(optimizer.state_dict())
    new = torch.randn(2, dtype=torch.float64, requires_grad=True)
    for either in (resumed, optimizer):
        either.add_param_group({"params": [new]})
        v: list[Any] = [d[0].clone(), torch.ones(2, dtype=torch.float64)]
        adaptation.apply(adaptation.plan(either, [*params, new], "exact"), v, "reference")
        assert torch.equal(v[0], expected[0]) and v[1] is None


def test_adafactor_takes_its_eps_from_the_first_parameter_of_the_group() -> None:
    """As torch does, where eps[0] is None: cells with a tiny variance are divided by it."""
    torch.manual_seed(0)
    first, second = torch.randn(4, requires_grad=True), torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adafactor([first, second])
    first.grad, second.grad = torch.randn(4), torch.full((4,), 1e-10, dtype=torch.float64)
    optimizer.step()
    (v,), _ = adapted(optimizer, [second], [torch.ones(4, dtype=torch.float64)], "exact", "reference")
    slope = -second.detach() / 1e-10  # u is linear in g where the variance is clamped
    torch.testing.assert_close(v, slope, rtol=1e-6, atol=0.0)


def test_a_step_of_adafactor_as_long_as_the_parameter_is_degenerate() -> None:
    p = torch.randn(8, requires_grad=True)
    optimizer = torch.optim.Adafactor([p], lr=2.0, d=3.0, beta2_decay=-2.0)
    for scale in (1.0, 1e3):
        p.grad = torch.randn(8) * scale
        optimizer.step()
    _, norm = adapted(optimizer, [p], [torch.randn(8)], "paper", "reference")
    assert norm.isnan()  # step_size makes a degenerate result of it


@pytest.mark.parametrize("found", [torch.optim.Adafactor, torch.optim.Muon, "transformers"])
def test_memory_is_that_of_one_parameter(found: Any) -> None:
    optimizer_type, size, peaks = _type(found), (200, 200), []
    for count in (1, 6):
        params = [torch.randn(size, requires_grad=True) for _ in range(count)]
        optimizer = optimizer_type(params)
        for p in params:
            p.grad = torch.randn(size)
        optimizer.step()
        d: list[Tensor | None] = [torch.randn(size) for _ in params]

        def work(optimizer: Any = optimizer, params: Any = params, d: Any = d) -> None:
            adaptation.apply(adaptation.plan(optimizer, params, "paper"), d, "reference")

        peaks.append(peak_bytes(work, torch.device("cpu"))[0])
    one = 4 * 200 * 200
    print(f"{found}: {peaks[0] / one:.1f} tensors of the parameter's size")
    assert one < peaks[0] < 40 * one
    assert peaks[1] < 1.05 * peaks[0]


def test_moments_of_rounding_noise_leave_float32_right() -> None:
    """transformers' Adafactor divides by moments of 1e-27; the power -1.5 of that, its derivative, is no float32."""
    kind = pytest.importorskip("transformers").Adafactor
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        params = [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in ((4, 3), (5,))]
        optimizer = kind(params, lr=1e-3, scale_parameter=False, relative_step=False)
        for _ in range(3):
            for p in params:
                p.grad = (torch.randn(p.shape, dtype=torch.float64) * 1e-13).to(dtype)
            optimizer.step()
        d = [torch.ones_like(p).detach() for p in params]
        lam = [torch.zeros_like(p).requires_grad_() for p in params]
        out = sk.meta_grad(
            lambda lam=lam, ps=params: sum((x * p).sum() for x, p in zip(lam, ps, strict=True)),
            lambda d=d, ps=params: sum((x * p).sum() for x, p in zip(d, ps, strict=True)) * 1e-9,
            base_params=params, meta_params=lam, optimizer=optimizer, difference="exact",
        )  # fmt: skip
        assert not out.degenerate
        found.append(flat(list(out.grads)).double())
    assert relative_error(found[0], found[1]) < 1e-5
