"""The values of the Triton kernels against the reference backend and float64; run by test_triton_kernels.py.

On CPU tensors under Triton's interpreter, else on the GPU. The lists are short because the interpreter is slow.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    SEED,
    Adam,
    assert_as_good,
    assert_close,
    clones,
    identical,
    randn,
    same_bits,
)
from test_ops import LAYOUTS, MIXES, specials, tensors
from torch import Tensor

from sama_kernels import backends, ops
from sama_kernels.backends import reference
from sama_kernels.backends.triton import adapt_norm, tables

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

# As in test_ops.py: nothing, one element, parts of a block (1024, or 512 with float64), several blocks and programs.
SHAPES: list[tuple[int, ...]] = [(0,), (1,), (129,), (2051,), (), (3, 70)]

# NumPy's, inside the interpreter: where it meets Inf and NaN, and where it takes arrays of one element as numbers.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_inputs() -> Iterator[None]:
    print(f"repeat with SAMA_TEST_SEED={SEED}")
    torch.manual_seed(SEED)
    with torch.device(DEVICE):
        yield


@pytest.fixture(params=["short", "long"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both configurations: a program has one block, or many."""
    if request.param == "long":
        monkeypatch.setattr(tables, "_MANY", 0)
    return str(request.param)


ADAM_OPTIONS: list[dict[str, Any]] = [
    {"mode": ops.PAPER},
    {"mode": ops.EXACT},
    {"mode": ops.PAPER, "maximize": True, "weight_decay": 0.1},
    {"mode": ops.PAPER, "amsgrad": True},
    {"mode": ops.EXACT, "maximize": True, "amsgrad": True, "weight_decay": 0.1},
]


@pytest.mark.parametrize(("dtype", "state"), MIXES, ids=str)
@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=lambda o: " ".join(map(str, o)))
def test_adam(dtype: torch.dtype, state: torch.dtype, options: dict[str, Any], chunks: str) -> None:
    case = Adam(SHAPES, dtype, state, **options)
    kernel, kernel_norm = case.run("triton")
    plain, plain_norm = case.run("reference")
    for i in range(len(SHAPES)):
        assert_as_good(kernel[i], plain[i], case.exact(i))
    if DEVICE == "cpu" and backends.unavailable("cpu", torch.device("cpu")) is None:
        assert all(map(same_bits, kernel, case.run("cpu")[0]))  # their square root is correctly rounded, torch's is not
    if dtype in (F32, F64):
        own_norm = sum(x.double().square().sum() for x in kernel)
        torch.testing.assert_close(kernel_norm, own_norm, rtol=1e-12, atol=0)
    torch.testing.assert_close(kernel_norm, plain_norm, rtol=1e-6, atol=0)
    unrounded = sum(case.exact(i).square().nansum() for i in range(len(SHAPES)))
    torch.testing.assert_close(kernel_norm, unrounded, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scalars", ["on the host", "on the device"])
@pytest.mark.parametrize("t", [1, 2, 1000, 10**7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adam_at_step(t: int, dtype: torch.dtype, scalars: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters of several dtypes, read by the host (same bits as if lr were a float) or by the kernel."""
    case = Adam(SHAPES, dtype, dtype if dtype != F16 else F32, t=t)
    place = "cpu" if scalars == "on the host" else DEVICE
    counters = itertools.cycle([F32, F64, torch.int64])
    case.steps = [torch.tensor(t, dtype=d, device=place) for d, _ in zip(counters, SHAPES, strict=False)]
    lr = torch.tensor(3e-3, dtype=F64, device=place)
    monkeypatch.setattr(adapt_norm, "_on_host", lambda scalar: scalars == "on the host")
    (kernel, norm), plain = case.run("triton", lr=lr), case.run("reference")[0]
    if scalars == "on the host":
        assert all(map(same_bits, kernel, case.run("triton", lr=3e-3)[0]))
        for i in range(len(SHAPES)):
            assert_as_good(kernel[i], plain[i], case.exact(i))
    else:  # beta^t comes from exp2: 1 - beta^t keeps 13 digits of it at the first step
        for a, b in zip(kernel, plain, strict=True):
            rtol = 1e-11 if dtype == F64 else 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(a, b, rtol=rtol, atol=1e-30)
    torch.testing.assert_close(norm, case.run("reference")[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", [ops.PAPER, ops.EXACT])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", ["v", "grads", "exp_avgs", "exp_avg_sqs"])
def test_adam_extreme_values(dtype: torch.dtype, mode: int, spread: str) -> None:
    values = specials(dtype)
    case = Adam([(len(values), 40)], dtype, dtype, mode=mode)
    x = values[:, None].expand(-1, 40).clone()
    setattr(case, spread, [x.abs() if spread == "exp_avg_sqs" else x])
    (kernel,), kernel_norm = case.run("triton")
    (plain,), plain_norm = case.run("reference")
    assert_close(kernel, plain)
    torch.testing.assert_close(kernel_norm, plain_norm, rtol=1e-6, atol=0, equal_nan=True)


def test_adam_untouched_cells() -> None:
    for mode, expected in ((ops.PAPER, 0.0), (ops.EXACT, 3e-3 * 0.1 / ((1 - 0.9**7) * 1e-8))):
        case = Adam([(1000,)], F32, F32, mode=mode)
        case.grads, case.exp_avgs, case.exp_avg_sqs = ([torch.zeros(1000)] for _ in range(3))
        torch.testing.assert_close(case.run("triton")[0][0], expected * case.v[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("read_by", ["host", "kernel"])
@pytest.mark.parametrize(("scale", "tensor"), [(0.3, None), (1.0, None), (-1.0, 0.05), (1.0, 1.0)])
def test_scale(
    dtype: torch.dtype, scale: float, tensor: float | None, read_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapt_norm, "_on_host", lambda scalar: read_by == "host")
    v = [*randn(SHAPES, dtype), specials(dtype)[:-4]]  # without Inf and NaN
    kernel, plain = clones(v), clones(v)
    place = "cpu" if read_by == "host" else DEVICE
    lr = None if tensor is None else torch.tensor(tensor, device=place)
    kernel_norm, plain_norm = (
        ops.adapt_norm_scale(x, scale, lr=lr, backend=b) for x, b in ((kernel, "triton"), (plain, "reference"))
    )
    assert all(map(same_bits, kernel, plain))
    torch.testing.assert_close(kernel_norm, plain_norm, rtol=1e-12, atol=0)


@pytest.mark.parametrize("count", [1, 5])
def test_step_size(count: int) -> None:
    parts = [torch.rand((), dtype=F64) + 0.1 for _ in range(count)]
    norm, epsilon, degenerate = ops.step_size(parts, 0.7, 1e-12, backend="triton")
    expected = math.sqrt(math.fsum(x.item() for x in parts))
    assert norm.item() == pytest.approx(expected, rel=1e-15)
    assert epsilon.item() == pytest.approx(0.7 / expected, rel=1e-15)
    assert not degenerate.item()
    for bad in (0.0, 1e-26, math.inf, math.nan):
        norm, epsilon, degenerate = ops.step_size([torch.tensor(bad, dtype=F64)], 0.7, 1e-12, backend="triton")
        assert epsilon.item() == 0 and degenerate.item() and degenerate.dtype == torch.bool
        assert norm.item() == pytest.approx(math.sqrt(bad), nan_ok=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.37, 1e-3, 1e-60, 0.0])
@pytest.mark.parametrize("rounding", [ops.NEAREST, ops.STOCHASTIC], ids=["nearest", "stochastic"])
def test_perturb_and_restore(dtype: torch.dtype, size: float, rounding: int, chunks: str) -> None:
    """The bits of the reference, random numbers included, on both sides, and theta again afterwards."""
    extremes = specials(dtype)
    grid = extremes[:, None].expand(-1, len(extremes)).clone()
    old = [*randn(SHAPES, dtype), grid]
    params, v = clones(old), [*randn(SHAPES, dtype), grid.t().clone()]
    plain_params, plain_v = clones(params), clones(v)
    epsilon, seed = torch.tensor(size, dtype=F64), int(torch.randint(-(2**63), 2**63 - 1, (), device="cpu"))
    for side in (ops.PLUS, ops.MINUS):
        options = {"rounding": rounding, "seed": seed} if side == ops.PLUS else {}
        for p, x, backend in ((params, v, "triton"), (plain_params, plain_v, "reference")):
            sums = ops.perturb(p, x, epsilon, side, **options, backend=backend)
            assert sums.shape == (2,) and sums.isnan().all()
        assert all(map(same_bits, params, plain_params))
        for a, b, p in zip(v, plain_v, plain_params, strict=True):
            assert torch.equal(reference.bits(a)[~p.isnan()], reference.bits(b)[~p.isnan()])
        if size == 0:
            assert all(map(identical, params, old))
    ops.restore(params, v, backend="triton")
    assert all(map(identical, params, old))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", [ops.NEAREST, ops.STOCHASTIC], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("size", [1e-2, 0.0])
def test_what_was_realised(dtype: torch.dtype, rounding: int, size: float, chunks: str) -> None:
    params, v, epsilon = randn(SHAPES, dtype), randn(SHAPES, dtype), torch.tensor(size, dtype=F64)
    kernel, plain = (
        ops.perturb(clones(params), clones(v), epsilon, ops.PLUS, rounding=rounding, seed=5, measure=True, backend=b)
        for b in ("triton", "reference")
    )
    torch.testing.assert_close(kernel, plain, rtol=1e-12, atol=0)
    minus = ops.perturb(params, v, epsilon, ops.MINUS, measure=True, backend="triton")
    assert minus.isnan().all()


@pytest.mark.parametrize(
    ("dtype", "other", "explicit"),
    [*((d, d, e) for d in DTYPES for e in (None, d)), (BF16, F32, F32), (F32, BF16, F16), (F64, F32, BF16)],
    ids=str,
)
def test_central_difference(dtype: torch.dtype, other: torch.dtype, explicit: torch.dtype | None, chunks: str) -> None:
    plus, minus = randn(SHAPES, dtype), randn(SHAPES, other)
    extra = [] if explicit is None else randn(SHAPES, explicit)
    inf, nan, zero, epsilon = (torch.tensor(x, dtype=F64) for x in (math.inf, math.nan, 0.0, 0.013))
    for step, norm in ((epsilon, epsilon), (zero, zero), (zero, inf), (zero, nan)):
        kernel, plain = clones(plus), clones(plus)
        ops.central_difference(kernel, minus, extra, step, norm, backend="triton")
        ops.central_difference(plain, minus, extra, step, norm, backend="reference")
        assert all(map(same_bits, kernel, plain))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("everywhere", [True, False], ids=["all operands", "the first operand"])
def test_layouts(dtype: torch.dtype, layout: str, everywhere: bool) -> None:
    """Any layout gives the values of contiguous tensors, and what lies between the elements is left alone."""
    shape = (3, 2, 7, 11)

    def check(run: Callable[..., Any], *inputs: Tensor) -> None:
        plain = clones(inputs)
        laid = [LAYOUTS[layout](x) if everywhere or i == 0 else x.clone() for i, x in enumerate(inputs)]
        whole = [x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0) for x in laid]
        before = clones(whole)
        run(*plain)
        run(*laid)
        for a, b, x, all_of_x, old in zip(laid, plain, inputs, whole, before, strict=True):
            assert identical(a.contiguous(), b)
            a.copy_(x)
            assert identical(all_of_x, old)

    case = Adam([shape], dtype, F32, weight_decay=0.1, amsgrad=True)
    epsilon = torch.tensor(0.25, dtype=F64)
    lists = (case.v, case.grads, case.exp_avgs, case.exp_avg_sqs, case.maxima, case.params)
    check(
        lambda *x: ops.adapt_norm_adam(*([y] for y in x), case.steps, **case.scalars, backend="triton"),
        *(x[0] for x in lists),
    )
    a, b, c = randn([shape] * 3, dtype)
    check(lambda x: ops.adapt_norm_scale([x], 0.3, backend="triton"), a)
    check(lambda x, y: ops.perturb([x], [y], epsilon, ops.PLUS, backend="triton"), a, b)
    check(lambda x, y: ops.perturb([x], [y], epsilon, ops.MINUS, backend="triton"), a, b)
    check(lambda x, y: ops.restore([x], [y], backend="triton"), a, b)
    check(lambda x, y, z: ops.central_difference([x], [y], [z], epsilon, epsilon, backend="triton"), a, b, c)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), v_dtype=st.sampled_from(DTYPES), state=st.sampled_from(DTYPES))
def test_any_shape_stride_and_dtype(data: st.DataObject, v_dtype: torch.dtype, state: torch.dtype) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    shapes = data.draw(st.lists(st.lists(st.integers(0, 6), max_size=4).map(tuple), min_size=1, max_size=4))

    def draw(dtype: torch.dtype) -> list[Tensor]:
        return [data.draw(tensors(shape, dtype)) for shape in shapes]

    case = Adam(shapes, v_dtype, state)
    case.v, case.grads, case.exp_avgs = draw(v_dtype), draw(data.draw(st.sampled_from(DTYPES))), draw(state)
    case.exp_avg_sqs = [x.square() + 0.01 for x in draw(state)]
    for a, b in zip(case.run("triton")[0], case.run("reference")[0], strict=True):
        assert_close(a, b)
    params, v, epsilon = draw(v_dtype), draw(v_dtype), torch.tensor(0.3, dtype=F64)
    old, rounding = clones(params), data.draw(st.sampled_from([ops.NEAREST, ops.STOCHASTIC]))
    plain, plain_bits = params, v  # clones may have other strides, and with them other random numbers
    params, v = ([torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x) for x in y] for y in (params, v))
    for p, x, backend in ((params, v, "triton"), (plain, plain_bits, "reference")):
        ops.perturb(p, x, epsilon, ops.PLUS, rounding=rounding, seed=11, backend=backend)
        ops.perturb(p, x, epsilon, ops.MINUS, backend=backend)
    assert all(map(same_bits, params, plain)) and all(map(same_bits, v, plain_bits))
    ops.restore(params, v, backend="triton")
    assert all(map(identical, params, old))
