"""How the CUDA kernels are launched: tables that overflow, clear errors; on a GPU graphs, streams and devices too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import emulation
import pytest
import torch
from emulation.places import Place, cpu, place_fixture, use_emulation  # noqa: F401
from op_cases import BF16, F32, F64, SEED, Adam, clones, free_memory, identical, needs_cpu_kernels, randn, same_bits
from test_ops_contract import ERRORS, op_inputs
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sama_kernels import backends, ops
from sama_kernels.upload import upload


@pytest.fixture(autouse=True)
def fresh_inputs() -> Iterator[None]:
    """Other random inputs in every run; pytest shows the printed line when a test fails."""
    print(f"repeat with SAMA_TEST_SEED={SEED}")
    torch.manual_seed(SEED)
    yield


def a_step(
    place: Place, case: Adam, params: list[Tensor], minus: list[Tensor], seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Every op once on the same inputs: what it wrote, and what it summed up; on the CPU."""
    v, norm_sq = place.adam(case)
    scaled, p, x, plus = (place.put(tensors) for tensors in (case.v, params, minus, minus))
    epsilon, backend = place.scalar(0.01), place.backend
    parts = [norm_sq.to(place.device), ops.adapt_norm_scale(scaled, 0.7, backend=backend)]
    norm, step, _ = ops.step_size(parts, 0.5, 1e-12, backend=backend)
    sums = ops.perturb(p, x, epsilon, ops.PLUS, rounding=ops.STOCHASTIC, seed=seed, measure=True, backend=backend)
    theta_plus = cpu(clones(p))
    ops.perturb(p, x, epsilon, ops.MINUS, backend=backend)
    theta_minus = cpu(clones(p))
    ops.restore(p, x, backend=backend)
    assert all(map(identical, cpu(p), params))
    ops.central_difference(plus, place.put(params), [], epsilon, epsilon, backend=backend)
    return cpu([*v, *scaled, *theta_plus, *theta_minus, *x, *plus]), cpu([*parts, norm, step, sums])


def many_tensors() -> tuple[Adam, list[Tensor], list[Tensor]]:
    """2,000 tensors, tiny ones and some that fill several blocks, of two dtypes in turn; some are empty."""
    shapes: list[tuple[int, ...]] = [(1 + i % 40,) for i in range(2000)]
    shapes[700:703] = [(33_001,), (0,), (16_384,)]
    case = Adam(shapes, F32, BF16, weight_decay=0.01)
    for i in range(0, 2000, 3):
        case.v[i] = case.v[i].double()  # computed in another launch
    dtypes = [(BF16, F32, F64)[i % 3] for i in range(2000)]
    params = [x.to(d) for x, d in zip(randn(shapes), dtypes, strict=True)]
    case.v = [x.to(d) if d != F32 else x for x, d in zip(case.v, dtypes, strict=True)]
    return case, params, [x.to(d) for x, d in zip(randn(shapes), dtypes, strict=True)]


@needs_cpu_kernels
def test_tables_that_overflow(place: Place) -> None:
    """More tensors than one launch holds: what the CPU kernels compute, in few launches."""
    case, params, minus = many_tensors()
    before = emulation.library().emulation_launches() if place.backend == "emulated" else 0
    results, sums = a_step(place, case, params, minus, SEED)
    if place.backend == "emulated":  # in float32 and in float64: 4 for adapt_norm_adam with 5 lists, 2 for most others
        assert 20 <= emulation.library().emulation_launches() - before <= 32
    expected, expected_sums = a_step(Place("cpu", "cpu"), case, params, minus, SEED)
    assert all(map(same_bits, results, expected))
    for a, b in zip(sums, expected_sums, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
def test_stores_fill_the_sectors_of_memory(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """What a warp stores with one instruction are whole sectors: half-filled ones would double the requests."""
    use_emulation(monkeypatch)
    numel = 3 * 16_384 + 5 * 256  # whole warps
    place = Place("emulated", "cpu")
    case = Adam([(numel,)], dtype, dtype)
    params, minus = randn([(numel,)], dtype), randn([(numel,)], dtype)
    stored, sectors = emulation.stored(lambda: a_step(place, case, params, minus, SEED))
    # v by adapt_norm_adam and adapt_norm_scale, theta and v twice by perturb, theta by restore, central_difference
    assert stored == 8 * numel * dtype.itemsize == 32 * sectors


def test_same_bits_in_every_run(place: Place) -> None:
    case, params, minus = many_tensors()

    def run() -> list[Tensor]:
        return [x for part in a_step(place, case, params, minus, 5) for x in part]

    first = run()
    assert all(map(identical, run(), first))
    if place.backend == "emulated":
        with emulation.backwards():
            assert all(map(identical, run(), first))
    else:
        assert all(all(map(identical, run(), first)) for _ in range(10))


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_bad_arguments_are_one_clear_error(place: Place, call: Callable[[str], object], message: str) -> None:
    """The very messages of the other backends, before anything is written."""
    if place.backend != "emulated":
        pytest.skip("these arguments are on the CPU")
    with pytest.raises(RuntimeError, match=message) as caught:
        call(place.backend)
    assert "\n" not in str(caught.value)


def test_expanded_and_aliased_operands(place: Place) -> None:
    """Operands that are only read may be expanded, or be the output itself."""
    a, b = randn([(300, 70)] * 2)
    b = b[:, :1].expand(300, 70)
    epsilon = place.scalar(0.5)
    (there,) = place.put([a])
    other = b.to(place.device)
    ops.central_difference([there], [other], [there], epsilon, epsilon, backend=place.backend)
    assert torch.equal(there.cpu(), (a - b) * -1.0 + a)
    tensors = [torch.randn(7, 5).t(), torch.randn(5, 7)]  # through copies, beside autograd
    p, x = (y.to(place.device).requires_grad_() for y in tensors)
    with torch.no_grad():
        ops.perturb([p], [x], epsilon, ops.PLUS, backend=place.backend)
        ops.restore([p], [x], backend=place.backend)
    assert identical(p.detach().cpu(), tensors[0]) and p.requires_grad and p.grad_fn is None


def test_no_tensors(place: Place) -> None:
    epsilon = place.scalar(0.5)
    assert ops.perturb([], [], epsilon, ops.PLUS, backend=place.backend).isnan().all()
    ops.central_difference([], [], [], epsilon, epsilon, backend=place.backend)


# What only a GPU can show


@pytest.fixture
def gpu() -> Place:
    why_not = backends.unavailable("cuda", torch.device("cuda"))
    if why_not is not None:
        pytest.skip(why_not)
    return Place("cuda", "cuda")


def bert_like(gpu: Place, device: str = "cuda") -> tuple[list[Tensor], ...]:
    shapes: list[tuple[int, ...]] = [(3000, 768), *[(768, 768), (768,)] * 8, (2,), (77,)]
    return tuple([x.to(device) for x in randn(shapes, dtype)] for dtype in (BF16, BF16, F32, F32))


@pytest.mark.gpu
def test_graph(gpu: Place) -> None:
    """A whole step is captured once and replayed with other inputs, other step counters and another lr."""
    params, v, m, w = bert_like(gpu)
    w = [x.square() for x in w]
    steps, lr = [torch.tensor(3.0, device="cuda") for _ in params], torch.tensor(0.01, device="cuda")
    inputs = [*params, *v, *m, *w, *steps, lr]

    def run() -> list[Tensor]:
        norm_sq = ops.adapt_norm_adam(
            v, v, m, w, [], [], steps, lr=lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, maximize=False,
            mode=ops.PAPER, backend="cuda",
        )  # fmt: skip
        norm, epsilon, _ = ops.step_size([norm_sq], 10.0, 1e-12, backend="cuda")
        sums = ops.perturb(params, v, epsilon, ops.PLUS, rounding=ops.STOCHASTIC, seed=3, measure=True, backend="cuda")
        plus = clones(params)
        ops.perturb(params, v, epsilon, ops.MINUS, backend="cuda")
        ops.central_difference(plus, params, [], epsilon, norm, backend="cuda")
        ops.restore(params, v, backend="cuda")
        return [*plus, norm, epsilon, sums]

    initial = clones(inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for change in (1.0, 2.0):
        for x, old in zip(inputs, initial, strict=True):
            x.copy_(old * change)
        expected = clones(run())
        for x, old in zip(inputs, initial, strict=True):
            x.copy_(old * change)
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(identical, captured, expected))
        assert all(map(identical, params, [old * change for old in initial[: len(params)]]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(op_inputs()))
def test_opcheck(gpu: Place, name: str) -> None:
    inputs = tree_map_only(Tensor, lambda x: x.to("cuda"), op_inputs()[name])
    torch.library.opcheck(getattr(torch.ops.sama, name).default, inputs)


@pytest.mark.gpu
def test_current_stream(gpu: Place) -> None:
    """The kernels wait for what is before them on a stream of its own, and are waited for."""
    params, v, *_ = bert_like(gpu)
    before = clones(params)
    epsilon, stream = gpu.scalar(0.5), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for p in params:
            p.mul_(2)
        ops.perturb(params, v, epsilon, ops.PLUS, backend="cuda")
        moved = clones(params)
        ops.restore(params, v, backend="cuda")
    stream.synchronize()
    assert all(identical(p, 2 * old) for p, old in zip(params, before, strict=True))
    assert not all(map(identical, moved, params))


@pytest.mark.gpu
def test_second_device(gpu: Place) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    params, v, *_ = bert_like(gpu, "cuda:1")
    expected, bits = clones(params), clones(v)
    epsilon = torch.tensor(0.5, dtype=F64, device="cuda:1")
    ops.perturb(params, v, epsilon, ops.PLUS, backend="cuda")
    ops.perturb(expected, bits, epsilon, ops.PLUS, backend="reference")
    assert torch.cuda.current_device() == 0 and all(map(same_bits, params, expected))
    with pytest.raises(RuntimeError, match=r"v\[0\] is not on the device of params\[0\]"):
        ops.restore(params, [x.to("cuda:0") for x in v], backend="cuda")


@pytest.mark.gpu
def test_numbers_on_another_device_are_copied_as_they_are(gpu: Place) -> None:
    """Only what lies on the CPU can be pinned."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    values = torch.randn(5, device="cuda:1")
    assert torch.equal(upload(values, torch.device("cuda:0")).cpu(), values.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("where", "message"),
    [(("cuda", "cpu"), r"v\[0\] is not on a CUDA device"), (("cpu", "cuda"), r"params\[0\] is not on a CUDA device")],
)
def test_mixed_devices(gpu: Place, where: tuple[str, str], message: str) -> None:
    tensors: list[Any] = [torch.ones(3, device=device) for device in where]
    with pytest.raises(RuntimeError, match=message):
        ops.restore([tensors[0]], [tensors[1]], backend="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "unaligned"])
def test_more_elements_than_32_bits_count(gpu: Place, shift: int) -> None:
    numel = 2**32 + 2**20 + 3
    if free_memory() < 6 * numel:
        pytest.skip("needs 26 GB of free memory")
    p, v = (torch.zeros(numel + shift, dtype=BF16, device="cuda")[shift:] for _ in range(2))
    places = torch.tensor([0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, numel - 4, numel - 1], device="cuda")
    p[places], v[places] = 1.0, 3.0
    sums = ops.perturb([p], [v], gpu.scalar(0.5), ops.PLUS, measure=True, backend="cuda")
    assert (p[places] == 2.5).all() and p.count_nonzero() == len(places)
    assert sums.tolist() == [len(places) * 2.25] * 2
    ops.restore([p], [v], backend="cuda")
    assert (p[places] == 1.0).all() and p.count_nonzero() == len(places)
    assert ops.adapt_norm_scale([p], 2.0, backend="cuda").item() == 4.0 * len(places)
