"""The values of `adapt_norm_moments`: CPU kernels against the reference backend and against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moments_cases import LISTS, VARIANTS, Moments, Variant
from op_cases import (
    DTYPES,
    F32,
    F64,
    SEED,
    assert_as_good,
    assert_close,
    clones,
    identical,
    needs_cpu_kernels,
    same_bits,
)
from test_ops import LAYOUTS, MIXES, SHAPES, specials, tensors
from torch import Tensor

from sama_kernels import ops

pytestmark = needs_cpu_kernels
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)


@pytest.fixture(autouse=True)
def fresh_inputs() -> Iterator[None]:
    """Other random inputs in every run; pytest shows the printed line when a test fails."""
    print(f"repeat with SAMA_TEST_SEED={SEED}")
    torch.manual_seed(SEED)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


@each_variant
@pytest.mark.parametrize(("dtype", "state"), MIXES, ids=str)
@pytest.mark.parametrize("exact", [False, True], ids=["paper", "exact"])
@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
def test_values(variant: Variant, dtype: torch.dtype, state: torch.dtype, exact: bool, maximize: bool) -> None:
    case = Moments(SHAPES, dtype, state, variant, maximize, exact)
    (kernel, kernel_norm), (plain, plain_norm) = case.run("cpu"), case.run("reference")
    right = [case.exact(i) for i in range(len(SHAPES))]
    # Over all tensors: for a single element plain may be exact.
    assert_as_good(flat(kernel), flat(plain), flat(right), case.factor)
    if dtype in (F32, F64):  # the norm is that of the values as they were computed, before they are rounded for storage
        torch.testing.assert_close(kernel_norm, flat(kernel).double().square().sum(), rtol=1e-12, atol=0)
    # Few cells make up most of the norm, those with a small w; there r is a difference, and g under decay another one.
    torch.testing.assert_close(kernel_norm, plain_norm, rtol=1e-4, atol=0)
    torch.testing.assert_close(kernel_norm, flat(right).square().nansum(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", ["v", "grads", "firsts", "seconds"])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.decay], ids=str)
def test_extreme_values(variant: Variant, dtype: torch.dtype, spread: str) -> None:
    values = specials(dtype)
    x = values[:, None].expand(-1, 40).clone()
    for exact in (False, True):
        case = Moments([(len(values), 40)], dtype, dtype, variant, exact=exact)
        if getattr(case, spread):
            setattr(case, spread, [x.abs() if spread == "seconds" else x])
        ((kernel,), kernel_norm), ((plain,), plain_norm) = case.run("cpu"), case.run("reference")
        # A centred second moment is a difference, of which one unit of a square root can become several.
        assert_close(kernel, plain, units=16 if variant.form == ops.CENTERED else 8)
        torch.testing.assert_close(kernel_norm, plain_norm, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.form != ops.LINEAR], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", ["v", "grads", "firsts", "seconds", "params", "buffers"])
def test_nan_is_not_hidden(variant: Variant, backend: str, bad: str) -> None:
    case = Moments([(5,)], F32, F32, variant)
    if not getattr(case, bad):
        return
    if variant.form == ops.MAXIMUM and not variant.decay and bad == "firsts":
        return  # where another step made the maximum, m is not part of D
    getattr(case, bad)[0][2] = torch.nan
    (v,), norm_sq = case.run(backend)
    assert v.isnan().tolist() == [False, False, True, False, False] and norm_sq.isnan()


def test_linear_is_scale() -> None:
    case = Moments(SHAPES, F32, F32, VARIANTS[0], maximize=True)
    kernel, norm = case.run("cpu")
    for i, v in enumerate(clones(case.v)):
        ops.adapt_norm_scale([v], -case.rows[i].rate * case.rows[i].slope, backend="cpu")
        assert_close(kernel[i], v)
    torch.testing.assert_close(norm, flat(kernel).double().square().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("everywhere", [True, False], ids=["all operands", "the first operand"])
def test_layouts(dtype: torch.dtype, layout: str, everywhere: bool) -> None:
    """Any layout gives the values of contiguous tensors, and what lies between the elements is left alone."""
    case = Moments([(3, 5, 17, 21)], dtype, F32, Variant(ops.CENTERED, True, 0.1, True))
    (plain,), plain_norm = case.run("cpu")
    for i, name in enumerate(LISTS):
        if everywhere or i == 0:
            setattr(case, name, [LAYOUTS[layout](x) for x in getattr(case, name)])
    (v,) = case.v
    old = v.clone()
    whole = v.as_strided((v.untyped_storage().nbytes() // v.element_size(),), (1,), 0)
    before = whole.clone()
    norm = ops.adapt_norm_moments(*case.lists, case.coefficients, **case.scalars, backend="cpu")
    assert identical(v.contiguous(), plain)
    torch.testing.assert_close(norm, plain_norm, rtol=1e-12, atol=0)
    v.copy_(old)
    assert identical(whole, before)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), dtype=st.sampled_from(DTYPES), state=st.sampled_from(DTYPES), variant=st.sampled_from(VARIANTS))
def test_any_shape_stride_and_dtype(
    data: st.DataObject, dtype: torch.dtype, state: torch.dtype, variant: Variant
) -> None:
    """The bits of contiguous tensors."""
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    shapes = data.draw(st.lists(st.lists(st.integers(0, 7), max_size=5).map(tuple), min_size=1, max_size=5))
    case = Moments(shapes, dtype, state, variant)
    plain, _ = case.run("cpu")
    for name in LISTS:
        strided = [data.draw(tensors(tuple(x.shape), x.dtype)).copy_(x) for x in getattr(case, name)]
        setattr(case, name, strided)
    v, _ = case.run("cpu")
    assert all(map(same_bits, v, plain))
