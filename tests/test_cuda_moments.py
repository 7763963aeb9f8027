"""`adapt_norm_moments` in CUDA against the reference and the CPU kernels; see test_cuda_kernels.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from emulation.places import Place, cpu, place_fixture, shifted  # noqa: F401
from moments_cases import LISTS, VARIANTS, Moments, Variant
from op_cases import BF16, DTYPES, F32, F64, SEED, assert_as_good, free_memory, identical, needs_cpu_kernels, same_bits
from test_cuda_kernels import SHAPES
from test_ops import LAYOUTS, MIXES, specials
from test_ops_moments import flat

from sama_kernels import ops


@pytest.fixture(autouse=True)
def fresh_inputs() -> Iterator[None]:
    """Other random inputs in every run; pytest shows the printed line when a test fails."""
    print(f"repeat with SAMA_TEST_SEED={SEED}")
    torch.manual_seed(SEED)
    yield


@needs_cpu_kernels
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("dtype", "state"), MIXES, ids=str)
@pytest.mark.parametrize("maximize", [False, True], ids=["paper", "exact maximize"])
def test_values(place: Place, variant: Variant, dtype: torch.dtype, state: torch.dtype, maximize: bool) -> None:
    case = Moments(SHAPES, dtype, state, variant, maximize, exact=maximize)
    plain, plain_norm = case.run("reference")
    compiled, _ = case.run("cpu")
    kernel, norm = place.moments(case)
    for name in LISTS:
        setattr(case, name, shifted(getattr(case, name)))
    unaligned, unaligned_norm = place.moments(case)
    assert all(map(same_bits, kernel, compiled)) and all(map(identical, kernel, unaligned))
    assert_as_good(flat(kernel), flat(plain), flat([case.exact(i) for i in range(len(SHAPES))]), case.factor)
    assert torch.equal(norm, unaligned_norm)
    torch.testing.assert_close(norm, plain_norm, rtol=1e-4, atol=0)
    if dtype in (F32, F64):  # the norm is that of the values as they were computed, before they are rounded for storage
        torch.testing.assert_close(norm, flat(kernel).double().square().sum(), rtol=1e-12, atol=0)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", ["v", "grads", "firsts", "seconds", "params"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_extreme_values(place: Place, variant: Variant, dtype: torch.dtype, spread: str) -> None:
    values = specials(dtype)
    case = Moments([(len(values), 40)], dtype, dtype, variant)
    x = values[:, None].expand(-1, 40).clone()
    if getattr(case, spread):
        setattr(case, spread, [x.abs() if spread == "seconds" else x])
    ((kernel,), norm), ((compiled,), compiled_norm) = place.moments(case), case.run("cpu")
    assert same_bits(kernel, compiled)
    torch.testing.assert_close(norm, compiled_norm, rtol=1e-12, atol=0, equal_nan=True)


@needs_cpu_kernels
@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[5], VARIANTS[8]], ids=str)
def test_rows_of_many_tensors(place: Place, variant: Variant) -> None:
    """More tensors than one launch holds, of two dtypes in turn: each takes its own row."""
    case = Moments([(1 + i % 17,) for i in range(1500)], F32, BF16, variant)
    case.v = [x.double() if i % 3 == 0 else x for i, x in enumerate(case.v)]
    (kernel, norm), (compiled, compiled_norm) = place.moments(case), case.run("cpu")
    assert all(map(same_bits, kernel, compiled))
    torch.testing.assert_close(norm, compiled_norm, rtol=1e-12, atol=0)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("everywhere", [True, False], ids=["all operands", "the first operand"])
def test_layouts(place: Place, dtype: torch.dtype, layout: str, everywhere: bool) -> None:
    """Any layout gives the values of contiguous tensors, and what lies between the elements is left alone."""
    case = Moments([(3, 5, 17, 21)], dtype, F32, Variant(ops.CENTERED, True, 0.1, True))
    (plain,), _ = case.run("cpu")
    for i, name in enumerate(LISTS):
        if everywhere or i == 0:
            setattr(case, name, [LAYOUTS[layout](x) for x in getattr(case, name)])
    v, *lists = map(place.put, case.lists)
    ops.adapt_norm_moments(v, *lists, case.coefficients.to(place.device), **case.scalars, backend=place.backend)
    (there,) = v
    assert same_bits(there.cpu().contiguous(), plain)
    there.copy_(case.v[0])
    whole = [x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0) for x in (there, case.v[0])]
    assert identical(whole[0].cpu(), whole[1])


@pytest.mark.gpu
@needs_cpu_kernels
def test_more_elements_than_32_bits_count(place: Place) -> None:
    numel = 2**32 + 2**20 + 3
    if place.device != "cuda" or free_memory() < 8 * numel:
        pytest.skip("needs 34 GB of free memory")
    case = Moments([(3000,)], BF16, BF16, VARIANTS[1])
    (expected,), _ = case.run("cpu")
    v, g = (torch.zeros(numel, dtype=BF16, device="cuda") for _ in range(2))
    v[-3000:], g[-3000:] = case.v[0].cuda(), case.grads[0].cuda()
    w = g.abs()
    w[-3000:] = case.seconds[0].cuda()
    ops.adapt_norm_moments([v], [g], [], [w], [], [], case.coefficients.cuda(), **case.scalars, backend="cuda")
    assert identical(v[-3000:].cpu(), expected) and not v[:-3000].any()
