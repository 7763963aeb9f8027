"""The CUDA kernels (csrc/cuda) against the reference and the CPU kernels: on a CPU by emulation, and on a GPU.

`emulation/` says what emulation proves. Launches, graphs, streams and errors are in test_cuda_launches.py.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from emulation.places import Place, cpu, place_fixture, shifted  # noqa: F401
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
from test_ops import LAYOUTS, MIXES, specials, tensors
from torch import Tensor

from sama_kernels import ops
from sama_kernels.backends import reference

# csrc/cuda/table.h and packs.h: a pack of 8 elements per thread, 2048 per round of a block, 16384 per block.
CHUNK = 16384
SHAPES: list[tuple[int, ...]] = [
    (0,), (1,), (7,), (8,), (9,), (), (33, 70), (4, 0, 2), (2047,), (2049,), (CHUNK,), (CHUNK + 1,), (2 * CHUNK + 13,),
]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_inputs() -> Iterator[None]:
    """Other random inputs in every run; pytest shows the printed line when a test fails."""
    print(f"repeat with SAMA_TEST_SEED={SEED}")
    torch.manual_seed(SEED)
    yield


# Values


@needs_cpu_kernels
@pytest.mark.parametrize(("dtype", "state"), MIXES, ids=str)
@pytest.mark.parametrize("mode", [ops.PAPER, ops.EXACT], ids=["paper", "exact"])
@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True}, {"weight_decay": 0.1, "maximize": True}, {"amsgrad": True, "weight_decay": 0.1}],
    ids=["", "amsgrad", "L2 maximize", "amsgrad L2"],
)  # fmt: skip
def test_adam(place: Place, dtype: torch.dtype, state: torch.dtype, mode: int, options: dict[str, Any]) -> None:
    case = Adam(SHAPES, dtype, state, mode=mode, **options)
    plain, plain_norm = case.run("reference")
    compiled, _ = case.run("cpu")
    kernel, norm = place.adam(case)
    for name in ("v", "grads", "exp_avgs", "exp_avg_sqs", "maxima", "params"):
        setattr(case, name, shifted(getattr(case, name)))
    unaligned, unaligned_norm = place.adam(case)
    assert all(map(same_bits, kernel, compiled)) and all(map(identical, kernel, unaligned))
    exact = [case.exact(i) for i in range(len(SHAPES))]  # all in one: plain PyTorch may be exact for a single element
    assert_as_good(*(torch.cat([x.flatten() for x in tensors]) for tensors in (kernel, plain, exact)))
    assert torch.equal(norm, unaligned_norm)
    torch.testing.assert_close(norm, plain_norm, rtol=1e-6, atol=0)
    if dtype in (F32, F64):  # the norm is that of the values as they were computed, before they are rounded for storage
        torch.testing.assert_close(norm, sum(x.double().square().sum() for x in kernel), rtol=1e-12, atol=0)


@needs_cpu_kernels
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_adam_at_every_exponent(place: Place, eps: float) -> None:
    """Roots and reciprocals are rounded as the CPU's are, at both ends of the range as in the middle."""
    numel = 1 << 16
    case = Adam([(numel,)], F32, F32, mode=ops.EXACT)
    case.scalars["eps"] = eps
    w = torch.randint(0, 2**31, (numel,), dtype=torch.int32).view(F32)
    w[:3] = torch.tensor([0.0, math.inf, math.nan])
    assert len(torch.frexp(w[3:]).exponent.unique()) > 250  # of 277
    case.exp_avg_sqs = [w]
    case.exp_avgs, case.grads = ([w.sqrt() * torch.randn(numel)] for _ in range(2))  # so that D d is no overflow
    (compiled,), _ = case.run("cpu")
    (kernel,), _ = place.adam(case)
    assert same_bits(kernel, compiled) and kernel.isfinite().float().mean() > 0.9


@pytest.mark.gpu
def test_roots_and_reciprocals_of_all_numbers(tmp_path: Path) -> None:
    """Against those of the GPU that IEEE 754 rounds correctly; here emulation's estimates are no evidence."""
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]))
    if nvcc is None:
        pytest.skip("nvcc is not in PATH")
    root, program = Path(__file__).parents[1], tmp_path / "every_float"
    options = ["-O3", "-std=c++17", "--fmad=false", "-arch=native", f"-I{root}"]
    subprocess.run([nvcc, *options, "-o", program, root / "tests" / "every_float.cu"], check=True)
    done = subprocess.run([program], check=True, capture_output=True, text=True)
    counts = {name: (int(wrong), int(taken)) for name, wrong, _, taken in map(str.split, done.stdout.splitlines())}
    assert [wrong for wrong, _ in counts.values()] == [0] * 4, done.stdout
    per_exponent = 2**23
    positive, negative = (127 + 62) * per_exponent + 1, 255 * per_exponent + 1  # 0 to 2^62, -0 to -Inf
    assert counts["UsualRange::root"][1] == positive + negative
    assert counts["UsualRange::inverse_or_zero"][1] == 2 * (252 * per_exponent + 1)  # from 2^-126 to 2^126
    assert counts["square_root"][1] == counts["reciprocal"][1] == 2**32


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("distinct", [1, 16, 17])
def test_steps_and_lr_on_host_and_device(place: Place, where: str, distinct: int) -> None:
    """Few different counters travel with the launch, many and those on the device take another way."""
    count = 1100  # in two launches of each kernel
    shapes = [(1 + i % 17,) for i in range(count)]
    case = Adam(shapes, F32, F32)
    kinds = itertools.cycle([F32, F64, torch.int64, torch.int32, BF16, F16])
    counters = [torch.tensor(1 + i % distinct, dtype=d) for d, i in zip(kinds, range(count), strict=False)]
    lr = torch.tensor(0.01)
    case.steps = counters
    plain, plain_norm = case.run("reference", lr=lr)
    if where == "host":
        kernel, norm = place.adam(case, lr=lr)
    else:
        case.steps = [t.to(place.device) for t in counters]
        case.steps[3] = counters[3]  # on a GPU this single one stays on the host
        with place.reading_scalars():
            kernel, norm = place.adam(case, lr=lr.to(place.device))
        case.steps = counters
    case.scalars["lr"] = lr.item()
    exact = [case.exact(i) for i in range(count)]
    for first in range(distinct):  # tensors of one element may by chance be exact in plain PyTorch
        assert_as_good(*(torch.cat(tensors[first::distinct]) for tensors in (kernel, plain, exact)))
    torch.testing.assert_close(norm, plain_norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", ["v", "grads", "exp_avgs", "exp_avg_sqs"])
def test_adam_extreme_values(place: Place, dtype: torch.dtype, spread: str) -> None:
    values = specials(dtype)
    for mode in (ops.PAPER, ops.EXACT):
        case = Adam([(len(values), 40)], dtype, dtype, mode=mode)
        x = values[:, None].expand(-1, 40).clone()
        setattr(case, spread, [x.abs() if spread == "exp_avg_sqs" else x])
        (kernel,), norm = place.adam(case)
        (plain,), plain_norm = case.run("reference")
        assert_close(kernel, plain)
        torch.testing.assert_close(norm, plain_norm, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "tensor"), [(0.3, None), (1.0, None), (-1.0, 0.05), (1.0, 1.0)])
@pytest.mark.parametrize("where", ["host", "device"])
def test_scale(place: Place, dtype: torch.dtype, scale: float, tensor: float | None, where: str) -> None:
    v = shifted([*randn(SHAPES, dtype), specials(dtype)[:-4]])  # without Inf and NaN
    kernel, plain = place.put(v), clones(v)
    lr = None if tensor is None else torch.tensor(tensor)
    plain_norm = ops.adapt_norm_scale(plain, scale, lr=lr, backend="reference")
    if lr is not None and where == "device":
        lr = lr.to(place.device)
    with place.reading_scalars() if where == "device" else nullcontext():
        norm = ops.adapt_norm_scale(kernel, scale, lr=lr, backend=place.backend)
    assert all(map(same_bits, cpu(kernel), plain))
    torch.testing.assert_close(norm.cpu(), plain_norm, rtol=1e-12, atol=0)


@pytest.mark.parametrize("count", [1, 5, 5000])
def test_step_size(place: Place, count: int) -> None:
    parts = [torch.rand((), dtype=F64) + 0.1 for _ in range(count)]
    norm, epsilon, degenerate = ops.step_size(place.put(parts), 0.7, 1e-12, backend=place.backend)
    expected = math.sqrt(math.fsum(x.item() for x in parts))
    assert norm.item() == pytest.approx(expected, rel=1e-12)
    assert epsilon.item() == 0.7 / norm.item() and not degenerate.item()
    for bad in (0.0, 1e-26, math.inf, math.nan):
        norm, epsilon, degenerate = ops.step_size([place.scalar(bad)], 0.7, 1e-12, backend=place.backend)
        assert epsilon.item() == 0 and degenerate.item() and degenerate.dtype == torch.bool


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.37, 1e-3, 1e-60, 0.0])
@pytest.mark.parametrize("rounding", [ops.NEAREST, ops.STOCHASTIC], ids=["nearest", "stochastic"])
def test_perturb_and_restore(place: Place, dtype: torch.dtype, size: float, rounding: int) -> None:
    extremes = specials(dtype)
    grid = extremes[:, None].expand(-1, len(extremes)).clone()
    params = shifted([*randn(SHAPES, dtype), grid, *randn([(77,)], F64), *randn([(50,)], BF16)])
    v = shifted([*randn(SHAPES, dtype, 0.1), grid.t(), *randn([(77,)], F64), *randn([(50,)], BF16)])
    p, x = place.put(params), place.put(v)
    plain, plain_v = clones(params), clones(v)
    for side, measure in ((ops.PLUS, True), (ops.MINUS, False)):
        options: dict[str, Any] = {"rounding": rounding, "seed": SEED - 2**40, "measure": measure}
        sums = ops.perturb(p, x, place.scalar(size), side, backend=place.backend, **options)
        plain_sums = ops.perturb(plain, plain_v, torch.tensor(size, dtype=F64), side, backend="reference", **options)
        assert all(map(same_bits, cpu(p), plain))
        for a, b, q in zip(cpu(x), plain_v, plain, strict=True):
            assert torch.equal(reference.bits(a)[~q.isnan()], reference.bits(b)[~q.isnan()])
        torch.testing.assert_close(sums.cpu(), plain_sums, rtol=1e-12, atol=0, equal_nan=True)
    ops.restore(p, x, backend=place.backend)
    assert all(map(identical, cpu(p), params))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_measured_sums_and_nan_without(place: Place, dtype: torch.dtype) -> None:
    params, v = randn(SHAPES, dtype), randn(SHAPES, dtype)
    epsilon = place.scalar(0.01)

    def sums(measure: bool, tensors: int = len(SHAPES), side: int = ops.PLUS) -> Tensor:
        p, x = place.put(params[:tensors]), place.put(v[:tensors])
        return ops.perturb(p, x, epsilon, side, measure=measure, backend=place.backend).cpu()

    p = clones(params)
    plain = ops.perturb(p, clones(v), torch.tensor(0.01, dtype=F64), ops.PLUS, measure=True, backend="reference")
    torch.testing.assert_close(sums(True), plain, rtol=1e-12, atol=0)
    assert sums(False).isnan().all() and sums(True, side=ops.MINUS).isnan().all()
    assert (sums(True, tensors=1) == 0).all() and sums(False, tensors=1).isnan().all()  # nothing to launch


@pytest.mark.parametrize(
    ("dtype", "other", "explicit"),
    [*((d, d, e) for d in DTYPES for e in (None, d)), (BF16, F32, F32), (F32, BF16, F16), (F64, F32, BF16)],
    ids=str,
)
def test_central_difference(place: Place, dtype: torch.dtype, other: torch.dtype, explicit: torch.dtype | None) -> None:
    plus, minus = shifted(randn(SHAPES, dtype)), shifted(randn(SHAPES, other))
    extra = [] if explicit is None else shifted(randn(SHAPES, explicit))
    for step, norm in ((0.013, 1.0), (0.0, 0.0), (0.0, math.inf), (0.0, math.nan)):
        kernel, plain = place.put(plus), clones(plus)
        ops.central_difference(
            kernel, place.put(minus), place.put(extra), place.scalar(step), place.scalar(norm), backend=place.backend
        )
        scalars = (torch.tensor(step, dtype=F64), torch.tensor(norm, dtype=F64))
        ops.central_difference(plain, minus, extra, *scalars, backend="reference")
        assert all(map(same_bits, cpu(kernel), plain))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("everywhere", [True, False], ids=["all operands", "the first operand"])
def test_layouts(place: Place, dtype: torch.dtype, layout: str, everywhere: bool) -> None:
    """Any layout gives the values of the reference, and what lies between the elements is left alone."""
    shape = (3, 5, 17, 21)
    epsilon = torch.tensor(0.25, dtype=F64)
    case = Adam([shape], dtype, F32, weight_decay=0.1, amsgrad=True)
    scalars, steps = case.scalars, case.steps
    stochastic: dict[str, Any] = {"rounding": ops.STOCHASTIC, "seed": 3}
    a, b, c = randn([shape] * 3, dtype)
    plus, bits = a.clone(), b.clone()
    ops.perturb([plus], [bits], epsilon, ops.PLUS, backend="reference")
    adam = tuple(x[0] for x in (case.v, case.grads, case.exp_avgs, case.exp_avg_sqs, case.maxima, case.params))
    calls: list[tuple[Callable[..., Any], tuple[Tensor, ...]]] = [
        (lambda e, k, *x: ops.adapt_norm_adam(*([y] for y in x), steps, **scalars, backend=k), adam),
        (lambda e, k, x: ops.adapt_norm_scale([x], 0.3, backend=k), (a,)),
        (lambda e, k, x, y: ops.perturb([x], [y], e, ops.PLUS, **stochastic, backend=k), (a, b)),
        (lambda e, k, x, y: ops.perturb([x], [y], e, ops.MINUS, backend=k), (plus, bits)),
        (lambda e, k, x, y: ops.restore([x], [y], backend=k), (plus, bits)),
        (lambda e, k, x, y, z: ops.central_difference([x], [y], [z], e, e, backend=k), (a, b, c)),
    ]  # fmt: skip
    for run, inputs in calls:
        laid = [LAYOUTS[layout](x) if everywhere or i == 0 else x.clone() for i, x in enumerate(inputs)]
        there = place.put(laid)
        run(epsilon, "reference", *laid)
        run(epsilon.to(place.device), place.backend, *there)
        for kernel, plain, before in zip(there, laid, inputs, strict=True):
            (assert_close if len(inputs) == 6 else _assert_same_bits)(kernel.cpu(), plain)
            kernel.copy_(before), plain.copy_(before)
            gaps = [x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0) for x in (kernel, plain)]
            assert identical(gaps[0].cpu(), gaps[1])


def _assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert same_bits(a, b)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), v_dtype=st.sampled_from(DTYPES), state=st.sampled_from(DTYPES))
def test_any_shape_stride_and_dtype(
    place: Place, data: st.DataObject, v_dtype: torch.dtype, state: torch.dtype
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    shapes = data.draw(st.lists(st.lists(st.integers(0, 7), max_size=5).map(tuple), min_size=1, max_size=5))

    def draw(dtype: torch.dtype) -> list[Tensor]:
        return [data.draw(tensors(shape, dtype)) for shape in shapes]

    case = Adam(shapes, v_dtype, state)
    case.v, case.grads, case.exp_avgs = draw(v_dtype), draw(data.draw(st.sampled_from(DTYPES))), draw(state)
    case.exp_avg_sqs = [x.square() + 0.01 for x in draw(state)]
    for a, b in zip(place.adam(case)[0], case.run("reference")[0], strict=True):
        assert_close(a, b)
    params, v, epsilon = draw(v_dtype), draw(v_dtype), torch.tensor(0.3, dtype=F64)
    p, x = place.put(params), place.put(v)
    old, seed = clones(params), data.draw(st.integers(-(2**63), 2**63 - 1))
    for side in (ops.PLUS, ops.MINUS):
        options: dict[str, Any] = {"rounding": ops.STOCHASTIC, "seed": seed}
        ops.perturb(p, x, epsilon.to(place.device), side, **options, backend=place.backend)
        ops.perturb(params, v, epsilon, side, **options, backend="reference")
        assert all(map(same_bits, cpu(p), params)) and all(map(same_bits, cpu(x), v))
    ops.restore(p, x, backend=place.backend)
    assert all(map(identical, cpu(p), old))
