"""The values of every op: compiled kernels against the reference backend and against the formulas in float64.

The contract of the ops (errors, opcheck, torch.compile, determinism) is in test_ops_contract.py.
"""

from __future__ import annotations

import itertools
import math
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
    needs_cpu_kernels,
    randn,
    same_bits,
)
from torch import Tensor

from sama_kernels import ops
from sama_kernels.backends import reference

pytestmark = needs_cpu_kernels

# Nothing, one element, less than a vector, a tile and a bit (512 elements), several tiles, several chunks (16384), none
# of them a multiple of a vector; a scalar; a matrix.
SHAPES: list[tuple[int, ...]] = [(0,), (1,), (3,), (129,), (1134,), (70001,), (), (33, 70), (4, 0, 2)]


@pytest.fixture(autouse=True)
def fresh_inputs() -> Iterator[None]:
    """Other random inputs in every run; pytest shows the printed line when a test fails."""
    print(f"repeat with SAMA_TEST_SEED={SEED}")
    torch.manual_seed(SEED)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: on busy cores a pool of threads is many times slower
    yield
    torch.set_num_threads(threads)


def assert_all_as_good(kernel: list[Tensor], plain: list[Tensor], case: Adam) -> None:
    """Over all tensors at once: in a tensor of one element plain PyTorch may happen to be exact."""
    exact = [case.exact(i) for i in range(len(SHAPES))]
    assert_as_good(*(torch.cat([x.flatten() for x in tensors]) for tensors in (kernel, plain, exact)))


MIXES = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F32), (BF16, F32), (F32, BF16), (F32, F64), (F64, F32)]


@pytest.mark.parametrize(("dtype", "state"), MIXES, ids=str)
@pytest.mark.parametrize("mode", [ops.PAPER, ops.EXACT], ids=["paper", "exact"])
@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("decay", [0.0, 0.1], ids=["", "L2"])
def test_adam(dtype: torch.dtype, state: torch.dtype, mode: int, maximize: bool, amsgrad: bool, decay: float) -> None:
    case = Adam(SHAPES, dtype, state, mode=mode, maximize=maximize, amsgrad=amsgrad, weight_decay=decay)
    kernel, kernel_norm = case.run("cpu")
    plain, plain_norm = case.run("reference")
    assert_all_as_good(kernel, plain, case)
    if dtype in (F32, F64):  # the norm is that of the values as they were computed, before they are rounded for storage
        own_norm = sum(x.double().square().sum() for x in kernel)
        torch.testing.assert_close(kernel_norm, own_norm, rtol=1e-12, atol=0)
    # One cell may be most of it, and be some units in the last place off.
    torch.testing.assert_close(kernel_norm, plain_norm, rtol=1e-12 if dtype == F64 else 3e-6, atol=0)
    unrounded = sum(case.exact(i).square().nansum() for i in range(len(SHAPES)))
    torch.testing.assert_close(kernel_norm, unrounded, rtol=1e-4, atol=0)


@pytest.mark.parametrize("t", [1, 2, 1000, 10**7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adam_at_step(t: int, dtype: torch.dtype) -> None:
    case = Adam(SHAPES, dtype, dtype if dtype != F16 else F32, t=t)
    case.steps = [torch.tensor(t, dtype=d) for d, _ in zip(itertools.cycle([F32, F64, torch.int64]), SHAPES)]
    kernel, plain = case.run("cpu")[0], case.run("reference")[0]
    assert_all_as_good(kernel, plain, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adam_with_tensor_lr_gives_the_same_bits(dtype: torch.dtype) -> None:
    case = Adam(SHAPES, dtype, F32)
    lr = torch.tensor(0.01)
    (a, a_norm), (b, b_norm) = case.run("cpu", lr=lr), case.run("cpu", lr=lr.item())
    assert all(map(same_bits, a, b))
    assert torch.equal(a_norm, b_norm)


def specials(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    values = [0.0, 1.0, info.tiny, info.tiny / 4, info.smallest_normal, 1e30, info.max, 1e-30, math.inf, math.nan]
    return torch.tensor([sign * x for x in values for sign in (1, -1)], dtype=F64).to(dtype)


@pytest.mark.parametrize("mode", [ops.PAPER, ops.EXACT])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", ["v", "grads", "exp_avgs", "exp_avg_sqs"])
def test_adam_extreme_values(dtype: torch.dtype, mode: int, spread: str) -> None:
    values = specials(dtype)
    case = Adam([(len(values), 40)], dtype, dtype, mode=mode)
    x = values[:, None].expand(-1, 40).clone()
    setattr(case, spread, [x.abs() if spread == "exp_avg_sqs" else x])
    (kernel,), kernel_norm = case.run("cpu")
    (plain,), plain_norm = case.run("reference")
    assert_close(kernel, plain)
    torch.testing.assert_close(kernel_norm, plain_norm, rtol=1e-6, atol=0, equal_nan=True)


def test_adam_untouched_cells() -> None:
    """g = m = w = 0: no part of the paper's D; lr (1 - b1) / (c1 eps) of the exact one."""
    for mode, expected in ((ops.PAPER, 0.0), (ops.EXACT, 3e-3 * 0.1 / ((1 - 0.9**7) * 1e-8))):
        case = Adam([(1000,)], F32, F32, mode=mode)
        case.grads, case.exp_avgs, case.exp_avg_sqs = ([torch.zeros(1000)] for _ in range(3))
        torch.testing.assert_close(case.run("cpu")[0][0], expected * case.v[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "tensor"), [(0.3, None), (1.0, None), (-1.0, 0.05), (1.0, 1.0)])
def test_scale(dtype: torch.dtype, scale: float, tensor: float | None) -> None:
    v = [*randn(SHAPES, dtype), specials(dtype)[:-4]]  # without Inf and NaN
    kernel, plain = clones(v), clones(v)
    lr = None if tensor is None else torch.tensor(tensor)
    kernel_norm, plain_norm = (
        ops.adapt_norm_scale(x, scale, lr=lr, backend=b) for x, b in ((kernel, "cpu"), (plain, "reference"))
    )
    assert all(map(same_bits, kernel, plain))
    torch.testing.assert_close(kernel_norm, plain_norm, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_step_size(backend: str) -> None:
    parts = [torch.rand((), dtype=F64) + 0.1 for _ in range(5)]
    norm, epsilon, degenerate = ops.step_size(parts, 0.7, 1e-12, backend=backend)
    expected = math.sqrt(math.fsum(x.item() for x in parts))
    assert norm.item() == pytest.approx(expected, rel=1e-15)
    assert epsilon.item() == pytest.approx(0.7 / expected, rel=1e-15)
    assert not degenerate.item()
    for bad in (0.0, 1e-26, math.inf, math.nan):
        norm, epsilon, degenerate = ops.step_size([torch.tensor(bad, dtype=F64)], 0.7, 1e-12, backend=backend)
        assert epsilon.item() == 0 and degenerate.item() and degenerate.dtype == torch.bool


def moved(params: list[Tensor], v: list[Tensor], epsilon: Tensor, backend: str) -> Iterator[tuple[list[Tensor], ...]]:
    """(params, v) after each side of `perturb` and after `restore`."""
    p, x = clones(params), clones(v)
    for side in (ops.PLUS, ops.MINUS):
        ops.perturb(p, x, epsilon, side, backend=backend)
        yield clones(p), clones(x)
    ops.restore(p, x, backend=backend)
    yield p, x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.37, 1e-3, 1e-60, 0.0])
def test_perturb_and_restore(dtype: torch.dtype, size: float) -> None:
    extremes = specials(dtype)
    grid = extremes[:, None].expand(-1, len(extremes)).clone()
    params, v = [*randn(SHAPES, dtype), grid], [*randn(SHAPES, dtype), grid.t()]
    epsilon = torch.tensor(size, dtype=F64)
    *perturbed, (restored, _) = moved(params, v, epsilon, "cpu")
    for kernel, plain in zip(perturbed, moved(params, v, epsilon, "reference"), strict=False):
        assert all(map(same_bits, kernel[0], plain[0]))
        for a, b, p in zip(kernel[1], plain[1], plain[0], strict=True):
            assert torch.equal(reference.bits(a)[~p.isnan()], reference.bits(b)[~p.isnan()])
        if size == 0:
            assert all(map(identical, kernel[0], params))
    assert all(map(identical, restored, params))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_perturb_moves_by_epsilon_v_on_both_sides(dtype: torch.dtype) -> None:
    (p,), (v,) = randn([(1134,)], dtype), randn([(1134,)], dtype)
    plus, minus, back = (stage[0][0] for stage in moved([p], [v], torch.tensor(0.25, dtype=F64), "cpu"))
    exact = p.double() + 0.25 * v.double()
    assert_as_good(plus, exact.to(dtype), exact)
    mirror = p.double() - (plus.double() - p.double())
    assert_as_good(minus, mirror.to(dtype), mirror)
    assert torch.equal(back, p)


@pytest.mark.parametrize(
    ("dtype", "other", "explicit"),
    [*((d, d, e) for d in DTYPES for e in (None, d)), (BF16, F32, F32), (F32, BF16, F16), (F64, F32, BF16)],
    ids=str,
)
def test_central_difference(dtype: torch.dtype, other: torch.dtype, explicit: torch.dtype | None) -> None:
    plus, minus = randn(SHAPES, dtype), randn(SHAPES, other)
    extra = [] if explicit is None else randn(SHAPES, explicit)
    inf, nan = torch.tensor(math.inf, dtype=F64), torch.tensor(math.nan, dtype=F64)
    zero, epsilon = torch.tensor(0.0, dtype=F64), torch.tensor(0.013, dtype=F64)
    for step, norm in ((epsilon, epsilon), (zero, zero), (zero, inf), (zero, nan)):
        kernel, plain = clones(plus), clones(plus)
        ops.central_difference(kernel, minus, extra, step, norm, backend="cpu")
        ops.central_difference(plain, minus, extra, step, norm, backend="reference")
        assert all(map(same_bits, kernel, plain))
        for i, (a, b) in enumerate(zip(plus, minus, strict=True)):
            exact = torch.zeros_like(a, dtype=F64) if step == 0 else -(a.double() - b.double()) / (2 * step)
            if extra and norm.isfinite():
                exact = exact + extra[i].double()
            assert_as_good(kernel[i], plain[i], exact)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "sliced": lambda x: torch.stack([x, -x], dim=-1)[..., 0],
    "inner": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 1), value=5.0)[..., 1:-1, 3:-2],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("everywhere", [True, False], ids=["all operands", "the first operand"])
def test_layouts(dtype: torch.dtype, layout: str, everywhere: bool) -> None:
    """Any layout gives the values of contiguous tensors, and what lies between the elements is left alone."""
    shape = (3, 5, 17, 21)

    def place(x: Tensor, index: int) -> Tensor:
        laid = LAYOUTS[layout](x) if everywhere or index == 0 else x.clone()
        assert torch.equal(laid, x)
        return laid

    def check(run: Callable[..., Any], *inputs: Tensor) -> None:
        plain, laid = clones(inputs), [place(x, i) for i, x in enumerate(inputs)]
        whole = [x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0) for x in laid]
        before = clones(whole)
        run(*plain)
        run(*laid)
        for a, b, x, all_of_x, old in zip(laid, plain, inputs, whole, before, strict=True):
            assert identical(a.contiguous(), b)
            a.copy_(x)
            assert identical(all_of_x, old)

    case = Adam([shape], dtype, F32, weight_decay=0.1, amsgrad=True)
    scalars, steps = case.scalars, case.steps
    epsilon = torch.tensor(0.25, dtype=F64)
    lists = (case.v, case.grads, case.exp_avgs, case.exp_avg_sqs, case.maxima, case.params)
    check(
        lambda *x: ops.adapt_norm_adam(*([y] for y in x), steps, **scalars, backend="cpu"),
        *(x[0] for x in lists),
    )
    a, b, c = randn([shape] * 3, dtype)
    check(lambda x: ops.adapt_norm_scale([x], 0.3, backend="cpu"), a)
    check(lambda x, y: ops.perturb([x], [y], epsilon, ops.PLUS, backend="cpu"), a, b)
    check(lambda x, y: ops.perturb([x], [y], epsilon, ops.MINUS, backend="cpu"), a, b)
    check(lambda x, y: ops.restore([x], [y], backend="cpu"), a, b)
    check(lambda x, y, z: ops.central_difference([x], [y], [z], epsilon, epsilon, backend="cpu"), a, b, c)


def test_expanded_gradients_and_aliased_operands() -> None:
    """Operands that are only read may be expanded, or be the output itself."""
    case = Adam([(40, 30)], F32, F32)
    case.grads = [torch.randn(40, 1).expand(40, 30)]
    assert_close(case.run("cpu")[0][0], case.run("reference")[0][0])
    a, b = torch.randn(2000), torch.randn(2000)
    epsilon = torch.tensor(0.5, dtype=F64)
    expected = (a - b) * -1.0 + a
    ops.central_difference([a], [b], [a], epsilon, epsilon, backend="cpu")
    assert torch.equal(a, expected)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A random tensor of this shape as a permuted, stepped, offset view of a larger one."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.integers(1, 3)) for _ in shape]
    offsets = [draw(st.integers(0, 2)) for _ in shape]
    base = torch.randn([shape[d] * steps[d] + offsets[d] for d in order]).to(dtype)
    view = base[tuple(slice(offsets[d], offsets[d] + shape[d] * steps[d], steps[d]) for d in order)]
    return view.permute([order.index(d) for d in range(len(shape))])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), v_dtype=st.sampled_from(DTYPES), state=st.sampled_from(DTYPES))
def test_any_shape_stride_and_dtype(data: st.DataObject, v_dtype: torch.dtype, state: torch.dtype) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    shapes = data.draw(st.lists(st.lists(st.integers(0, 7), max_size=5).map(tuple), min_size=1, max_size=5))

    def draw(dtype: torch.dtype) -> list[Tensor]:
        return [data.draw(tensors(shape, dtype)) for shape in shapes]

    case = Adam(shapes, v_dtype, state)
    case.v, case.grads, case.exp_avgs = draw(v_dtype), draw(data.draw(st.sampled_from(DTYPES))), draw(state)
    case.exp_avg_sqs = [x.square() + 0.01 for x in draw(state)]
    for a, b in zip(case.run("cpu")[0], case.run("reference")[0], strict=True):
        assert_close(a, b)
    params, v, epsilon = draw(v_dtype), draw(v_dtype), torch.tensor(0.3, dtype=F64)
    old, plain, plain_bits = clones(params), clones(params), clones(v)
    for p, x, backend in ((params, v, "cpu"), (plain, plain_bits, "reference")):
        ops.perturb(p, x, epsilon, ops.PLUS, backend=backend)
        ops.perturb(p, x, epsilon, ops.MINUS, backend=backend)
    assert all(map(same_bits, params, plain)) and all(map(same_bits, v, plain_bits))
    ops.restore(params, v, backend="cpu")
    assert all(map(identical, params, old))
