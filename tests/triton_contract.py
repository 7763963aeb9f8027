"""What the Triton kernels promise beside values: errors, determinism, few launches; run by test_triton_kernels.py."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import problems
import pytest
import torch
from captured import ADAPTATIONS, Capture, ElementWisePart, Run, capture_by_mode, check_replays
from moments_cases import Moments, Variant
from op_cases import BF16, F16, F32, F64, SEED, Adam, clones, free_memory, identical, randn, same_bits
from test_ops_contract import ERRORS
from torch import Tensor

import sama_kernels as sk
from sama_kernels import backends, ops
from sama_kernels.backends import triton as triton_backend
from sama_kernels.backends.triton import launch, tables

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SHAPES: list[tuple[int, ...]] = [(40, 30), (), (0,), (7,)]

# NumPy's, inside the interpreter: where it meets Inf and NaN, and where it takes arrays of one element as numbers.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_inputs() -> Iterator[None]:
    print(f"repeat with SAMA_TEST_SEED={SEED}")
    torch.manual_seed(SEED)
    with torch.device(DEVICE):
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched."""
    names: list[str] = []
    run = launch.run

    def noted(kernel: Any, *arguments: Any, **constants: Any) -> None:
        names.append(kernel.fn.__name__)
        run(kernel, *arguments, **constants)

    monkeypatch.setattr(launch, "run", noted)
    return names


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def test_the_backend_is_there() -> None:
    assert backends.resolve("triton", torch.device(DEVICE)) == "triton"


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_bad_arguments_are_one_clear_error_before_anything_is_written(
    call: Callable[[str], object], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message) as caught:
        call("triton")
    assert "\n" not in str(caught.value)


def test_tensors_on_two_devices_are_refused() -> None:
    restore = importlib.import_module("sama_kernels.backends.triton.restore").restore
    here, elsewhere = torch.ones(3), torch.ones(3, device="meta")
    message = rf"v\[1\] is on meta, but params\[0\] is on {DEVICE}"
    with pytest.raises(RuntimeError, match=message):
        restore([here, here], [here, elsewhere])
    with pytest.raises(RuntimeError, match=r"on meta|needs CUDA tensors"):
        restore([elsewhere], [here])
    assert torch.equal(here, torch.ones(3))


def everything(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    torch.manual_seed(SEED)
    case = Adam(shapes, F32, BF16, weight_decay=0.01)
    v, norm_sq = case.run("triton")
    scaled = clones(case.v)
    parts = [norm_sq, ops.adapt_norm_scale(scaled, 0.7, backend="triton")]
    norm, epsilon, _ = ops.step_size(parts, 0.5, 1e-12, backend="triton")
    params = clones(case.params)
    sums = ops.perturb(params, v, epsilon, ops.PLUS, measure=True, backend="triton")
    plus = clones(params)
    ops.perturb(params, v, epsilon, ops.MINUS, backend="triton")
    ops.central_difference(plus, params, [], epsilon, norm, backend="triton")
    restored = clones(params)
    ops.restore(restored, v, backend="triton")
    assert all(map(identical, restored, case.params))
    return [*v, *scaled, *parts, norm, epsilon, sums, *params, *plus]


def test_same_bits_in_every_run() -> None:
    shapes = [(13_001,) if DEVICE == "cpu" else (20_000_001,), (33, 77), *[(1 + i % 40,) for i in range(30)], (3, 5)]
    first = everything(shapes)
    for _ in range(1 if DEVICE == "cpu" else 20):
        assert all(map(identical, everything(shapes), first))


def test_one_launch_for_the_whole_model(launches: list[str]) -> None:
    """Per combination of dtypes and alignment, and one for the sum."""
    case = Adam([(5,)] * 50, BF16, F32)
    case.run("triton")
    assert launches == ["adam_kernel", "sum_kernel"]
    launches.clear()
    aligned, shifted = randn([(20,)] * 2), [torch.randn(21)[1:] for _ in range(2)]
    ops.restore([*aligned, *shifted, *randn([(4,)], F16)], [*clones(aligned), *clones(shifted), *randn([(4,)], F16)],
                backend="triton")  # fmt: skip
    assert launches == ["restore_kernel"] * 3


def test_mixed_dtypes_in_one_list() -> None:
    """The tensors of one list go into several launches; each keeps its own random numbers and its place in the sums."""
    dtypes = [BF16, F32, F16, F64, BF16]
    params, v = ([torch.randn(1500).to(d) for d in dtypes] for _ in range(2))
    expected_params, expected_v = clones(params), clones(v)
    sums = [
        ops.perturb(p, x, scalar(0.01), ops.PLUS, rounding=ops.STOCHASTIC, seed=3, measure=True, backend=backend)
        for p, x, backend in ((params, v, "triton"), (expected_params, expected_v, "reference"))
    ]
    assert all(map(same_bits, params, expected_params)) and all(map(same_bits, v, expected_v))
    torch.testing.assert_close(*sums, rtol=1e-12, atol=0)
    norms = [ops.adapt_norm_scale(clones(params), 0.3, backend=b) for b in ("triton", "reference")]
    torch.testing.assert_close(*norms, rtol=1e-12, atol=0)


def test_empty_lists_and_tensors(launches: list[str]) -> None:
    nothing = [torch.empty(0), torch.empty(3, 0)]
    ops.restore([], [], backend="triton")
    ops.central_difference([], [], [], scalar(1), scalar(1), backend="triton")
    assert ops.adapt_norm_scale(nothing, 0.5, backend="triton").item() == 0
    assert ops.perturb(nothing, clones(nothing), scalar(1), ops.PLUS, measure=True, backend="triton").tolist() == [0, 0]
    assert ops.perturb([], [], scalar(1), ops.PLUS, measure=True, backend="triton").tolist() == [0, 0]
    assert launches == []


def test_tables_are_found_again_by_address() -> None:
    params, v = randn(SHAPES), randn(SHAPES)
    before = tables._tables.cache_info()
    for _ in range(3):
        ops.restore(params, v, backend="triton")
    middle = tables._tables.cache_info()
    assert (middle.misses - before.misses, middle.hits - before.hits) == (1, 2)
    moved = clones(v)  # another address: a new table, or theta would be restored from what was there before
    expected = [reference_restored(p, x) for p, x in zip(params, moved, strict=True)]
    ops.restore(params, moved, backend="triton")
    assert tables._tables.cache_info().misses == middle.misses + 1
    assert all(map(identical, params, expected))


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU test_captured_steps.py captures real graphs")
@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_captured_launches_find_their_numbers_in_memory(adaptation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CUDA graph has them: the arguments of the capture, whose tensors have other contents in every replay."""
    adapt_norm = importlib.import_module("sama_kernels.backends.triton.adapt_norm")
    monkeypatch.setattr(adapt_norm, "_on_host", lambda scalar: False)
    kind = type(adapt_norm.adam_kernel)
    now = kind.run

    def kernels(capture: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Run]:
        def later(kernel: Any, *arguments: Any, **constants: Any) -> None:
            capture.note(lambda: now(kernel, *arguments, **constants))

        with pytest.MonkeyPatch.context() as patch, capture:
            patch.setattr(kind, "run", later)
            name = func.name().removeprefix("sama::").removesuffix("_triton")
            return triton_backend.kernel(name)(*args, **kwargs), lambda: None  # all that it did has been noted

    def capture(functions: list[Run]) -> list[Run]:
        for function in functions:
            function()  # the tables of addresses are made before, as on a GPU
        return capture_by_mode(kernels)(functions)

    check_replays(lambda: ElementWisePart("cpu", "triton", adaptation), capture)


def reference_restored(p: Tensor, x: Tensor) -> Tensor:
    copy = p.clone()
    ops.restore([copy], [x], backend="reference")
    return copy


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_perturb_is_all_or_nothing(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that fails in the middle of the list (a compiler error, out of memory) leaves theta as it was."""
    perturb = importlib.import_module("sama_kernels.backends.triton.perturb")
    params, v = ([torch.randn(50).to(d) for d in (F32, BF16, F64)] for _ in range(2))
    before, number = clones(params), iter(range(3))

    def interrupted(*arguments: Any, **constants: Any) -> None:
        if next(number) == failing:
            raise KeyboardInterrupt
        launch.launch(*arguments, **constants)

    monkeypatch.setattr(perturb, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ops.perturb(params, v, scalar(0.1), ops.PLUS, backend="triton")
    assert all(map(identical, params, before))


def test_in_place_changes_are_seen_by_autograd() -> None:
    p = torch.randn(5, requires_grad=True)
    loss = (p * p).sum()
    with torch.no_grad():
        ops.perturb([p], [torch.randn(5)], scalar(0.1), ops.PLUS, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


OPS = [
    "adapt_norm_adam",
    "adapt_norm_scale",
    "adapt_norm_moments",
    "step_size",
    "perturb",
    "restore",
    "central_difference",
]


def op_inputs(name: str) -> tuple[Any, ...]:
    """Arguments as the op is registered."""
    case = Adam(SHAPES, F32, BF16, weight_decay=0.1, amsgrad=True)
    lists = (case.v, case.grads, case.exp_avgs, case.exp_avg_sqs, case.maxima, case.params, case.steps)
    moments = Moments(SHAPES, F32, BF16, Variant(ops.CENTERED, True, 0.1, True))
    arguments: dict[str, tuple[Any, ...]] = {
        "adapt_norm_adam": (*lists, scalar(0.1), 0.0, 0.9, 0.999, 1e-8, 0.1, False, ops.EXACT),
        "adapt_norm_scale": (randn(SHAPES), None, 0.5),
        "adapt_norm_moments": (*moments.lists, moments.coefficients.to(DEVICE), 0.1, False, ops.CENTERED),
        "step_size": ([scalar(2.0), scalar(3.0)], 1.0, 1e-12),
        "perturb": (randn(SHAPES), randn(SHAPES), scalar(0.1), ops.PLUS, ops.NEAREST, 3, True),
        "restore": (randn(SHAPES), randn(SHAPES)),
        "central_difference": (randn(SHAPES), randn(SHAPES), randn(SHAPES), scalar(0.1), scalar(1.0)),
    }
    return arguments[name]


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.sama, f"{name}_triton").default, op_inputs(name))


def test_compile_without_graph_breaks() -> None:
    def step(v: list[Tensor], params: list[Tensor]) -> tuple[Tensor, ...]:
        norm_sq = ops.adapt_norm_scale(v, 2.0, backend="triton")
        norm, epsilon, _ = ops.step_size([norm_sq], 0.3, 1e-12, backend="triton")
        ops.perturb(params, v, epsilon, ops.PLUS, backend="triton")
        return norm, epsilon

    v, params = randn(SHAPES), randn(SHAPES)
    eager, compiled = (clones(v), clones(params)), (clones(v), clones(params))
    expected = step(*eager)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for a, b in zip([*compiled[0], *compiled[1]], [*eager[0], *eager[1]], strict=True):
        assert identical(a, b)


def norm_in_float64(problem: Any, case: int, optimizer: torch.optim.Optimizer) -> float:
    """||D d|| with today's d, gradients and state of float32, in float64 arithmetic."""
    d = [x.double() for x in torch.autograd.grad(problem.meta_loss(), problem.theta)]
    twins = [p.detach().double().requires_grad_() for p in problem.theta]
    optimizer_type, options = problems.OPTIMIZERS[case]
    twin = optimizer_type(twins, **options)
    for p, t in zip(problem.theta, twins, strict=True):
        t.grad = p.grad.double()
        for key, value in optimizer.state[p].items():
            own = isinstance(value, Tensor) and value.shape == p.shape
            twin.state[t][key] = value.double() if own else copy.deepcopy(value)
    mu = torch.zeros((), dtype=F64, requires_grad=True)
    out = sk.meta_grad(
        lambda: mu * torch.stack([t.sum() for t in twins]).sum(),
        lambda: torch.stack([(t * x).sum() for t, x in zip(twins, d, strict=True)]).sum(),
        base_params=twins, meta_params=[mu], optimizer=twin, difference="exact", backend="reference",
    )  # fmt: skip
    return out.norm.item()


@pytest.mark.parametrize("case", range(len(problems.OPTIMIZERS)))
def test_the_whole_meta_gradient(case: int) -> None:
    problem = problems.weight_net(SEED % 1000, dtype=F32)
    optimizer = problems.after_steps(problem, case)
    theta = problems.snapshot(problem.theta)
    outs = [problems.meta_grad(problem, optimizer, alpha=1e-2, backend=b) for b in ("triton", "reference")]
    assert all(map(identical, [p.detach() for p in problem.theta], theta))
    triton_grads, plain_grads = (problems.flat(out.grads) for out in outs)
    # theta+- may differ by a unit in the last place, which the quotient divides by 2 epsilon
    assert problems.relative_error(triton_grads, plain_grads) < 1e-3
    # After few steps D can be a small difference of large terms, each rounded to float32 (NAdam: up to 1e-5 in 3 of 100
    # problems, of plain PyTorch's norm too): what counts is the distance from the same formula in float64.
    triton, plain = (out.norm.item() for out in outs)
    exact = norm_in_float64(problem, case, optimizer)
    assert abs(triton - exact) <= max(1e-6 * exact, 8 * abs(plain - exact)), (triton, plain, exact)
    assert not outs[0].degenerate.item()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs tens of GB of a GPU")
def test_more_elements_than_32_bits_can_count() -> None:
    numel = 2**32 + 2**20 + 11
    if free_memory() < 8 * numel:
        pytest.skip("needs 34 GB of free GPU memory")
    p, v = (torch.zeros(numel, dtype=BF16) for _ in range(2))
    tail = slice(numel - 3000, numel)
    p[tail], v[tail] = torch.randn(3000).to(BF16), torch.randn(3000).to(BF16)
    old, expected = p[tail].clone(), (p[tail].float() + 0.25 * v[tail].float()).to(BF16)
    ops.perturb([p], [v], scalar(0.25), ops.PLUS, backend="triton")
    assert identical(p[tail], expected)
    assert not p[: numel - 3000].any()
    ops.restore([p], [v], backend="triton")
    assert identical(p[tail], old)
