"""`adapt_norm_low_bit_adam` in CUDA against the reference and the CPU kernels; see test_cuda_kernels.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import emulation
import pytest
import torch
from emulation.places import Place, cpu, place_fixture, shifted  # noqa: F401
from low_bit_cases import BITS, ERRORS, LowBit
from op_cases import BF16, DTYPES, F32, F64, SEED, free_memory, identical, needs_cpu_kernels, same_bits
from test_cuda_kernels import SHAPES
from test_ops import LAYOUTS, specials
from test_ops_low_bit import MIXES, op_inputs
from test_ops_moments import flat
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sama_experiments.common.memory import peak_bytes
from sama_kernels import ops


@pytest.fixture(autouse=True)
def fresh_inputs() -> Iterator[None]:
    """Other random inputs in every run; pytest shows the printed line when a test fails."""
    print(f"repeat with SAMA_TEST_SEED={SEED}")
    torch.manual_seed(SEED)
    yield


@needs_cpu_kernels
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("dtype", "grads"), MIXES, ids=str)
@pytest.mark.parametrize("block_size", [256, 100, 7, 2**30])
@pytest.mark.parametrize("t", [1, 7])
def test_values(place: Place, bits: int, dtype: torch.dtype, grads: torch.dtype, block_size: int, t: int) -> None:
    case = LowBit(SHAPES, dtype, grads, bits, block_size, ops.EXACT if t == 1 else ops.PAPER, t)
    (plain, plain_norm), (compiled, _) = case.run("reference"), case.run("cpu")
    kernel, norm = place.low_bit(case)
    for name in ("v", "grads", "exp_avg_codes", "exp_avg_sq_codes"):
        setattr(case, name, shifted(getattr(case, name)))
    unaligned, unaligned_norm = place.low_bit(case)
    assert all(map(same_bits, kernel, compiled)) and all(map(identical, kernel, unaligned))
    case.assert_as_good(kernel, plain)
    assert torch.equal(norm, unaligned_norm)
    torch.testing.assert_close(norm, plain_norm, rtol=1e-5, atol=0)  # one cell may be most of it, and be some ulps off
    if dtype in (F32, F64):  # the norm is that of the values as they were computed, before they are rounded for storage
        torch.testing.assert_close(norm, flat(kernel).double().square().sum(), rtol=1e-12, atol=0)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", ["v", "grads", "exp_avg_scales", "exp_avg_sq_scales"])
def test_extreme_values(place: Place, dtype: torch.dtype, spread: str) -> None:
    values = specials(F32 if spread.endswith("scales") else dtype)
    case = LowBit([(len(values), 40)], dtype, block_size=40)
    x = values if spread.endswith("scales") else values[:, None].expand(-1, 40).clone()
    setattr(case, spread, [x.abs() if spread == "exp_avg_sq_scales" else x])
    ((kernel,), norm), ((compiled,), compiled_norm) = place.low_bit(case), case.run("cpu")
    assert same_bits(kernel, compiled)
    torch.testing.assert_close(norm, compiled_norm, rtol=1e-12, atol=0, equal_nan=True)


@needs_cpu_kernels
@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("distinct", [1, 16, 17])
def test_many_tensors_and_steps_on_host_and_device(place: Place, where: str, distinct: int) -> None:
    """More tensors than one launch holds, of two dtypes in turn; some of them at their first step, in any order."""
    case = LowBit([(1 + i % 17,) for i in range(1000)], F32, BF16)
    case.v = [x.double() if i % 3 == 0 else x for i, x in enumerate(case.v)]
    case.steps = [torch.tensor(1 + i % distinct, dtype=(F32, torch.int64)[i % 2]) for i in range(1000)]
    expected, expected_norm = case.run("cpu", lr=torch.tensor(0.01))
    if where == "host":
        kernel, norm = place.low_bit(case, lr=torch.tensor(0.01))
    else:
        case.steps = [t.to(place.device) for t in case.steps]
        with place.reading_scalars():
            kernel, norm = place.low_bit(case, lr=torch.tensor(0.01, device=place.device))
    if place.backend == "emulated":  # the same pow
        assert all(map(same_bits, kernel, expected))
    torch.testing.assert_close(flat(kernel), flat(expected), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm, expected_norm, rtol=1e-5, atol=0)


@needs_cpu_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("everywhere", [True, False], ids=["v and grads", "v"])
def test_layouts(place: Place, layout: str, everywhere: bool) -> None:
    case = LowBit([(3, 5, 17, 21)], BF16, F32, bits=4)
    (plain,), _ = case.run("cpu")
    v = LAYOUTS[layout](case.v[0])
    grad = LAYOUTS[layout](case.grads[0]) if everywhere else case.grads[0]
    (there,), grads, *rest = map(place.put, ([v], [grad], *case.lists[2:-1]))
    ops.adapt_norm_low_bit_adam([there], grads, *rest, case.steps, **case.options, backend=place.backend)
    assert same_bits(there.cpu().contiguous(), plain)
    there.copy_(case.v[0])
    whole = [x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0) for x in (there, v)]
    assert identical(whole[0].cpu(), whole[1])


def test_same_bits_in_every_run_and_no_memory_beyond_v(place: Place) -> None:
    case = LowBit([(64, 1024), (100, 100), (0,), (33,)]).to(place.device)

    def run() -> list[Tensor]:
        v, norm = place.low_bit(case)
        return [*v, norm]

    first = run()
    if place.backend == "emulated":
        with emulation.backwards():
            assert all(map(identical, run(), first))
    else:
        assert all(all(map(identical, run(), first)) for _ in range(10))

    def work() -> None:
        ops.adapt_norm_low_bit_adam(*case.lists, **case.options, backend=place.backend)

    assert peak_bytes(work, torch.device(place.device))[0] <= 4096  # slots of sums; v alone has 300 KB


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_bad_arguments_are_one_clear_error(place: Place, call: Callable[[str], object], message: str) -> None:
    if place.backend != "emulated":
        pytest.skip("these arguments are on the CPU")
    with pytest.raises(RuntimeError, match=message) as caught:
        call(place.backend)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_opcheck_and_devices(place: Place) -> None:
    if place.device != "cuda":
        pytest.skip("for a GPU")
    torch.library.opcheck(
        torch.ops.sama.adapt_norm_low_bit_adam.default, tree_map_only(Tensor, lambda x: x.cuda(), op_inputs())
    )
    case = LowBit([(40,)]).to("cuda")
    case.exp_avg_scales = cpu(case.exp_avg_scales)
    with pytest.raises(RuntimeError, match=r"exp_avg_scales\[0\] is not on a CUDA device"):
        case.run("cuda")


@pytest.mark.gpu
@needs_cpu_kernels
def test_more_elements_than_32_bits_count(place: Place) -> None:
    numel = 2**32 + 2**20 + 4
    if place.device != "cuda" or free_memory() < 7 * numel:
        pytest.skip("needs 31 GB of free memory")
    case = LowBit([(4096,)], BF16, bits=4)
    (expected,), _ = case.run("cpu")
    v, g = (torch.zeros(numel, dtype=BF16, device="cuda") for _ in range(2))
    m, w = (torch.zeros(numel // 2, dtype=torch.uint8, device="cuda") for _ in range(2))
    place_of = slice(2**32, 2**32 + 4096)
    in_bytes, in_blocks = slice(2**31, 2**31 + 2048), slice(2**24, 2**24 + 16)
    m_scales, w_scales = (torch.zeros(-(-numel // 256), device="cuda") for _ in range(2))
    there = case.to("cuda")
    v[place_of], g[place_of], m[in_bytes], w[in_bytes] = (
        there.v[0], there.grads[0], there.exp_avg_codes[0], there.exp_avg_sq_codes[0]
    )  # fmt: skip
    m_scales[in_blocks], w_scales[in_blocks] = there.exp_avg_scales[0], there.exp_avg_sq_scales[0]
    lists = ([v], [g], [m], [m_scales], there.exp_avg_tables, [w], [w_scales], there.exp_avg_sq_tables, case.steps)
    ops.adapt_norm_low_bit_adam(*lists, **case.options, backend="cuda")
    assert identical(v[place_of].cpu(), expected) and v.count_nonzero() == expected.count_nonzero()
