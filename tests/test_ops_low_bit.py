"""`adapt_norm_low_bit_adam`: CPU kernels against the reference backend and float64, and what every op promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from low_bit_cases import BITS, ERRORS, LISTS, LowBit
from op_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    SEED,
    assert_close,
    clones,
    identical,
    needs_cpu_kernels,
    same_bits,
)
from test_ops import LAYOUTS, SHAPES, specials, tensors
from test_ops_contract import BACKENDS
from test_ops_moments import flat
from torch import Tensor

from sama_experiments.common.memory import peak_bytes
from sama_kernels import ops
from sama_kernels.backends import reference
from sama_kernels.ops._library import fake_norm_sq

MIXES = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F32), (F32, BF16), (F64, F32)]
each_bits = pytest.mark.parametrize("bits", BITS, ids=lambda bits: f"{bits} bits")


@pytest.fixture(autouse=True)
def fresh_inputs() -> Iterator[None]:
    """Other random inputs in every run; pytest shows the printed line when a test fails."""
    print(f"repeat with SAMA_TEST_SEED={SEED}")
    torch.manual_seed(SEED)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@needs_cpu_kernels
@each_bits
@pytest.mark.parametrize(("dtype", "grads"), MIXES, ids=str)
@pytest.mark.parametrize("block_size", [256, 100, 7, 2**30])
@pytest.mark.parametrize("t", [1, 2, 1000])
@pytest.mark.parametrize("mode", [ops.PAPER, ops.EXACT], ids=["paper", "exact"])
def test_values(bits: int, dtype: torch.dtype, grads: torch.dtype, block_size: int, t: int, mode: int) -> None:
    case = LowBit(SHAPES, dtype, grads, bits, block_size, mode, t)
    (kernel, norm), (plain, plain_norm) = case.run("cpu"), case.run("reference")
    right = flat([case.exact(i) for i in range(len(SHAPES))])
    case.assert_as_good(kernel, plain)
    if dtype in (F32, F64):  # the norm is that of the values as they were computed, before they are rounded for storage
        torch.testing.assert_close(norm, flat(kernel).double().square().sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(norm, plain_norm, rtol=1e-5, atol=0)  # one cell may be most of it, and be some ulps off
    torch.testing.assert_close(norm, right.square().nansum(), rtol=1e-4, atol=0)


@needs_cpu_kernels
@each_bits
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_adam_at_the_dequantised_moments(bits: int, dtype: torch.dtype) -> None:
    """One arithmetic, whether the moments come from memory or out of codes."""
    case = LowBit(SHAPES, dtype, bits=bits)
    (kernel, norm), v = case.run("cpu"), clones(case.v)
    wide = F64 if dtype == F64 else F32
    m, w = ([case.moment(name, i).to(wide) for i in range(len(SHAPES))] for name in ("exp_avg", "exp_avg_sq"))
    w = [torch.maximum(x, (1 - 0.999) * g.to(wide).square()) for x, g in zip(w, case.grads, strict=True)]
    options = {k: x for k, x in case.options.items() if k != "block_size"}
    expected = ops.adapt_norm_adam(
        v, case.grads, m, w, [], [], case.steps, **options, weight_decay=0.0, maximize=False, backend="cpu"
    )
    assert all(map(identical, kernel, v)) and torch.equal(norm, expected)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", ["v", "grads", "exp_avg_scales", "exp_avg_sq_scales"])
@pytest.mark.parametrize("t", [1, 2])
def test_extreme_values(dtype: torch.dtype, spread: str, t: int) -> None:
    """NaN in g, m or w is NaN in v, but for NaN in the m of a cell that was never touched."""
    values = specials(F32 if spread.endswith("scales") else dtype)
    for mode in (ops.PAPER, ops.EXACT):
        case = LowBit([(len(values), 40)], dtype, block_size=40, mode=mode, t=t)
        x = values if spread.endswith("scales") else values[:, None].expand(-1, 40).clone()
        setattr(case, spread, [x.abs() if spread == "exp_avg_sq_scales" else x])
        ((kernel,), norm), ((plain,), plain_norm) = case.run("cpu"), case.run("reference")
        assert_close(kernel, plain)
        torch.testing.assert_close(norm, plain_norm, rtol=1e-5, atol=0, equal_nan=True)
        bad = values.isnan() if t == 2 or not spread.endswith("scales") else torch.zeros(len(values), dtype=torch.bool)
        # In float16 a gradient of 1e-8 is 0, and its w then mostly too.
        empty = (case.grads[0] == 0) & (case.moment("exp_avg_sq", 0).view(len(values), 40) == 0)
        empty &= spread == "exp_avg_scales"
        assert kernel[bad[:, None] & ~empty].isnan().all() and not kernel[bad[:, None] & empty].any()


@needs_cpu_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("everywhere", [True, False], ids=["v and grads", "v"])
@each_bits
def test_layouts(bits: int, layout: str, everywhere: bool) -> None:
    """Codes number the elements in row-major order, whatever v and g look like; gaps in v are left alone."""
    case = LowBit([(3, 5, 17, 21)], BF16, F32, bits)
    (plain,), _ = case.run("cpu")
    v = LAYOUTS[layout](case.v[0])
    grad = LAYOUTS[layout](case.grads[0]) if everywhere else case.grads[0]
    whole = v.as_strided((v.untyped_storage().nbytes() // v.element_size(),), (1,), 0)
    before = whole.clone()
    ops.adapt_norm_low_bit_adam([v], [grad], *case.lists[2:], **case.options, backend="cpu")
    assert identical(v.contiguous(), plain)
    v.copy_(case.v[0])
    assert identical(whole, before)


@needs_cpu_kernels
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    data=st.data(), dtype=st.sampled_from(DTYPES), grads=st.sampled_from(DTYPES), bits=st.sampled_from(BITS),
    block_size=st.integers(1, 40),
)  # fmt: skip
def test_any_shape_stride_and_dtype(
    data: st.DataObject, dtype: torch.dtype, grads: torch.dtype, bits: int, block_size: int
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    shapes = data.draw(st.lists(st.lists(st.integers(0, 7), max_size=5).map(tuple), min_size=1, max_size=5))
    case = LowBit(shapes, dtype, grads, bits, block_size)
    plain, _ = case.run("cpu")
    for name in ("v", "grads"):
        setattr(case, name, [data.draw(tensors(tuple(x.shape), x.dtype)).copy_(x) for x in getattr(case, name)])
    for a, b, c in zip(case.run("cpu")[0], plain, case.run("reference")[0], strict=True):
        assert same_bits(a, b)
        assert_close(a, c)


@needs_cpu_kernels
def test_tensor_lr_and_counters_of_any_dtype() -> None:
    case = LowBit(SHAPES)
    expected, norm = case.run("cpu")
    case.steps = [torch.tensor(7, dtype=(F32, F64, torch.int64, torch.int32)[i % 4]) for i in range(len(SHAPES))]
    got, got_norm = case.run("cpu", lr=torch.tensor(3e-3, dtype=F64))
    assert all(map(identical, got, expected)) and torch.equal(got_norm, norm)


@needs_cpu_kernels
def test_same_bits_for_any_number_of_threads_and_in_every_run() -> None:
    case = LowBit([(700_001,), (513, 77), *[(1 + i % 40,) for i in range(600)], (3, 5)], bits=4)
    first, norm = case.run("cpu")
    for threads in (2, 2, 3):
        torch.set_num_threads(threads)
        again, again_norm = case.run("cpu")
        assert all(map(identical, again, first)) and torch.equal(again_norm, norm)


@needs_cpu_kernels
def test_no_memory_beyond_v() -> None:
    case = LowBit([(256, 1024), (1024, 100)])
    assert peak_bytes(lambda: ops.adapt_norm_low_bit_adam(*case.lists, **case.options, backend="cpu"), CPU)[0] < 100
    assert peak_bytes(lambda: case.run("reference"), CPU)[0] > 4 * 256 * 1024  # it would be seen


CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_bad_arguments_are_one_clear_error_before_anything_is_written(
    call: Callable[[str], object], message: str, backend: str
) -> None:
    with pytest.raises(RuntimeError, match=message) as caught:
        call(backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_changes_are_seen_by_autograd(backend: str) -> None:
    case = LowBit([(40,)])
    p = torch.randn(40, requires_grad=True)
    loss = (p * case.v[0]).sum()
    with torch.no_grad():
        ops.adapt_norm_low_bit_adam(*case.lists, **case.options, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def op_inputs() -> tuple[Any, ...]:
    """Arguments as the op is registered."""
    case = LowBit([(40, 30), (), (0,), (7,)], F32, BF16, bits=4)
    return (*case.lists, 256, torch.tensor(0.1, dtype=F64), 0.0, 0.9, 0.999, 1e-8, ops.EXACT)


@pytest.fixture(scope="module")
def reference_op() -> Any:
    """The same schema and fake kernel in another namespace, where nothing compiled is registered."""
    library, name = torch.library.Library("sama_reference_low_bit", "DEF"), "adapt_norm_low_bit_adam"
    library.define(str(torch.ops.sama.adapt_norm_low_bit_adam.default._schema).removeprefix("sama::"))
    library.impl(name, reference.adapt_norm_low_bit_adam, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sama_reference_low_bit::{name}", fake_norm_sq, lib=library)
    return torch.ops.sama_reference_low_bit.adapt_norm_low_bit_adam.default, library


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, reference_op: Any) -> None:
    op = torch.ops.sama.adapt_norm_low_bit_adam.default if backend == "cpu" else reference_op[0]
    torch.library.opcheck(op, op_inputs())


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_without_graph_breaks(backend: str) -> None:
    case = LowBit([(40, 30), (7,)])

    def step(*lists: list[Tensor]) -> Tensor:
        return ops.adapt_norm_low_bit_adam(*lists, **case.options, backend=backend) * 2

    eager, compiled = ([clones(x) for x in case.lists] for _ in range(2))
    torch.compiler.reset()
    graph = torch.compile(step, fullgraph=True, backend="inductor" if backend == "cpu" else "aot_eager")
    torch.testing.assert_close(graph(*compiled), step(*eager))
    assert all(map(torch.equal, compiled[0], eager[0])) and len(LISTS) == len(eager)
