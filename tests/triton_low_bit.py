"""`adapt_norm_low_bit_adam` in Triton against the CPU kernels and float64; run by test_triton_kernels.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from low_bit_cases import BITS, ERRORS, LowBit
from op_cases import BF16, DTYPES, F32, F64, assert_close, clones, identical, same_bits
from test_ops import LAYOUTS, specials
from test_ops_low_bit import MIXES, op_inputs
from test_ops_moments import flat
from torch.utils._pytree import tree_map_only
from triton_contract import launches  # noqa: F401
from triton_values import DEVICE, SHAPES, chunks, fresh_inputs, pytestmark  # noqa: F401

from sama_experiments.common.memory import peak_bytes
from sama_kernels import backends, ops
from sama_kernels.backends import triton

COMPARABLE = DEVICE == "cpu" and backends.unavailable("cpu", torch.device("cpu")) is None


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("dtype", "grads"), MIXES, ids=str)
@pytest.mark.parametrize(("block_size", "t"), [(256, 1), (256, 7), (100, 2), (7, 2), (2**30, 1000)])
def test_values(bits: int, dtype: torch.dtype, grads: torch.dtype, block_size: int, t: int, chunks: str) -> None:  # noqa: F811
    case = LowBit(SHAPES, dtype, grads, bits, block_size, ops.EXACT if chunks == "long" else ops.PAPER, t)
    (kernel, norm), (plain, plain_norm) = case.run("triton"), case.run("reference")
    case.assert_as_good(kernel, plain)
    if COMPARABLE:  # their square root is correctly rounded, torch's is not
        assert all(map(same_bits, kernel, case.run("cpu")[0]))
    if dtype in (F32, F64):
        torch.testing.assert_close(norm, flat(kernel).double().square().sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(norm, plain_norm, rtol=1e-5, atol=0)  # one cell may be most of it, and be some ulps off


@pytest.mark.parametrize("where", ["host", "device"])
def test_lr_and_steps(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tensors at their first step. What is on the device is read by the kernel, not by the host."""
    if where == "device":
        adapt_norm = pytest.importorskip("sama_kernels.backends.triton.adapt_norm")
        monkeypatch.setattr(adapt_norm, "_on_host", lambda scalar: False)
    case = LowBit(SHAPES)
    case.steps = [torch.tensor(1 + i % 3, dtype=(F32, torch.int64)[i % 2]) for i in range(len(SHAPES))]
    (kernel, norm), (plain, plain_norm) = (case.run(b, lr=torch.tensor(0.01)) for b in ("triton", "reference"))
    for a, b in zip(kernel, plain, strict=True):
        assert_close(a, b)
    torch.testing.assert_close(norm, plain_norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", ["v", "grads", "exp_avg_scales", "exp_avg_sq_scales"])
def test_extreme_values(dtype: torch.dtype, spread: str) -> None:
    values = specials(F32 if spread.endswith("scales") else dtype)
    case = LowBit([(len(values), 40)], dtype, block_size=40)
    x = values if spread.endswith("scales") else values[:, None].expand(-1, 40).clone()
    setattr(case, spread, [x.abs() if spread == "exp_avg_sq_scales" else x])
    ((kernel,), norm), ((plain,), plain_norm) = case.run("triton"), case.run("reference")
    assert_close(kernel, plain)
    torch.testing.assert_close(norm, plain_norm, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("everywhere", [True, False], ids=["v and grads", "v"])
def test_layouts(layout: str, everywhere: bool) -> None:
    case: Any = LowBit([(3, 2, 7, 11), (4,)], BF16, F32, bits=4)
    plain, _ = case.run("triton")
    case.v[0] = LAYOUTS[layout](case.v[0])
    if everywhere:
        case.grads[0] = LAYOUTS[layout](case.grads[0])
    v = case.v[0]
    old = v.clone()
    whole = v.as_strided((v.untyped_storage().nbytes() // v.element_size(),), (1,), 0)
    before = whole.clone()
    ops.adapt_norm_low_bit_adam(*case.lists, **case.options, backend="triton")
    assert identical(v.contiguous(), plain[0]) and identical(case.v[1], plain[1])
    v.copy_(old)
    assert identical(whole, before)


def test_codes_that_begin_anywhere(launches: list[str]) -> None:  # noqa: F811
    """One launch for all tensors whose operands are aligned, another for those with codes that are not."""
    case = LowBit([(40,), (1030,), (3,)], bits=4)
    expected, norm = case.run("triton")
    launches.clear()
    codes = case.exp_avg_codes[1]
    case.exp_avg_codes[1] = torch.cat([codes[:1], codes])[1:]
    got, got_norm = case.run("triton")
    assert all(map(identical, got, expected)) and launches == ["low_bit_adam_kernel"] * 2 + ["sum_kernel"]
    torch.testing.assert_close(got_norm, norm, rtol=1e-12, atol=0)


def test_same_bits_in_every_run_and_no_memory_beyond_v() -> None:
    case = LowBit([(13_001,), (33, 77), (3, 5)])
    (first, norm), (again, again_norm) = case.run("triton"), case.run("triton")
    assert all(map(identical, again, first)) and torch.equal(again_norm, norm)
    v = clones(case.v)

    def work() -> None:
        ops.adapt_norm_low_bit_adam(v, *case.lists[1:], **case.options, backend="triton")

    work()
    assert peak_bytes(work, torch.device(DEVICE))[0] <= 4096  # slots and tables of addresses; v alone has 62 KB


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_bad_arguments_are_one_clear_error_before_anything_is_written(
    call: Callable[[str], object], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message) as caught:
        call("triton")
    assert "\n" not in str(caught.value)


def test_operands_on_two_devices_are_refused() -> None:
    case = LowBit([(40,)])
    case.exp_avg_sq_scales = [x.to("meta") for x in case.exp_avg_sq_scales]
    with pytest.raises(RuntimeError, match=rf"exp_avg_sq_scales\[0\] is on meta, but v\[0\] is on {DEVICE}"):
        triton.kernel("adapt_norm_low_bit_adam")(*case.lists, 256, None, 0.1, 0.9, 0.999, 1e-8, ops.PAPER)


def test_opcheck() -> None:
    inputs = tree_map_only(torch.Tensor, lambda x: x.to(DEVICE), op_inputs())
    torch.library.opcheck(torch.ops.sama.adapt_norm_low_bit_adam_triton.default, inputs)


def test_compile_without_graph_breaks() -> None:
    case = LowBit([(40, 30), (7,)])

    def step(*lists: list[torch.Tensor]) -> torch.Tensor:
        return ops.adapt_norm_low_bit_adam(*lists, **case.options, backend="triton") * 2

    eager, compiled = ([clones(x) for x in case.lists] for _ in range(2))
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    torch.testing.assert_close(actual, step(*eager), rtol=0, atol=0)
    assert all(map(torch.equal, compiled[0], eager[0]))
