"""`adapt_norm_moments` in Triton against the CPU kernels, the reference and float64; run by test_triton_kernels.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moments_cases import LISTS, VARIANTS, Moments, Variant
from op_cases import BF16, DTYPES, F32, F64, assert_as_good, assert_close, identical, same_bits
from test_ops import LAYOUTS, MIXES, specials
from triton_values import DEVICE, SHAPES, chunks, fresh_inputs, pytestmark  # noqa: F401

from sama_kernels import backends, ops

COMPARABLE = DEVICE == "cpu" and backends.unavailable("cpu", torch.device("cpu")) is None


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("dtype", "state"), MIXES, ids=str)
def test_values(variant: Variant, dtype: torch.dtype, state: torch.dtype, chunks: str) -> None:  # noqa: F811
    maximize = chunks == "long"
    case = Moments(SHAPES, dtype, state, variant, maximize, exact=maximize)
    case.coefficients = case.coefficients.to(DEVICE)
    (kernel, norm), (plain, plain_norm) = case.run("triton"), case.run("reference")
    flat = [torch.cat([x.flatten() for x in xs]) for xs in (kernel, plain, [case.exact(i) for i in range(len(SHAPES))])]
    assert_as_good(*flat, case.factor)
    if COMPARABLE:  # their square root is correctly rounded, torch's is not
        assert all(map(same_bits, kernel, case.run("cpu")[0]))
    if dtype in (F32, F64):
        torch.testing.assert_close(norm, flat[0].double().square().sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(norm, plain_norm, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", ["v", "grads", "firsts", "seconds"])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.decay], ids=str)
def test_extreme_values(variant: Variant, dtype: torch.dtype, spread: str) -> None:
    values = specials(dtype)
    case = Moments([(len(values), 40)], dtype, dtype, variant)
    case.coefficients = case.coefficients.to(DEVICE)
    x = values[:, None].expand(-1, 40).clone()
    if getattr(case, spread):
        setattr(case, spread, [x.abs() if spread == "seconds" else x])
    ((kernel,), norm), ((plain,), plain_norm) = case.run("triton"), case.run("reference")
    assert_close(kernel, plain)
    torch.testing.assert_close(norm, plain_norm, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("everywhere", [True, False], ids=["all operands", "the first operand"])
def test_layouts(layout: str, everywhere: bool) -> None:
    case: Any = Moments([(3, 2, 7, 11), (4,)], BF16, F32, Variant(ops.CENTERED, True, 0.1, True))
    case.coefficients = case.coefficients.to(DEVICE)
    plain, _ = case.run("triton")
    for i, name in enumerate(LISTS):
        if everywhere or i == 0:
            setattr(case, name, [LAYOUTS[layout](getattr(case, name)[0]), getattr(case, name)[1]])
    v = case.v[0]
    old = v.clone()
    whole = v.as_strided((v.untyped_storage().nbytes() // v.element_size(),), (1,), 0)
    before = whole.clone()
    ops.adapt_norm_moments(*case.lists, case.coefficients, **case.scalars, backend="triton")
    assert identical(v.contiguous(), plain[0]) and identical(case.v[1], plain[1])
    v.copy_(old)
    assert identical(whole, before)
