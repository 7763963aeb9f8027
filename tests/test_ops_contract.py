"""What the ops promise beside values: clear errors before any change, the same bits every time, torch's own checks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from moments_cases import LISTS, Moments, Variant
from op_cases import BF16, F32, F64, SEED, Adam, clones, identical, needs_cpu_kernels, randn
from torch import Tensor

from sama_kernels import ops
from sama_kernels.backends import reference
from sama_kernels.ops._library import fake_norm_sq

BACKENDS = [pytest.param("cpu", marks=needs_cpu_kernels), "reference"]
SHAPES: list[tuple[int, ...]] = [(40, 30), (), (0,), (7,)]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


@pytest.fixture(autouse=True)
def fresh_inputs() -> Iterator[None]:
    """Other random inputs in every run; pytest shows the printed line when a test fails."""
    print(f"repeat with SAMA_TEST_SEED={SEED}")
    torch.manual_seed(SEED)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# Determinism


def everything(backend: str, threads: int) -> list[Tensor]:
    """The results of all ops on a list that fills many chunks, with many small tensors and an odd end."""
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    shapes = [(700_001,), (513, 77), *[(1 + i % 40,) for i in range(600)], (3, 5)]
    case = Adam(shapes, F32, BF16, weight_decay=0.01)
    v, norm_sq = case.run(backend)
    scaled = clones(case.v)
    moments, moments_sq = Moments(shapes, F32, BF16, Variant(ops.RATIO, True, 0.01)).run(backend)
    parts = [norm_sq, moments_sq, ops.adapt_norm_scale(scaled, 0.7, backend=backend)]
    norm, epsilon, _ = ops.step_size(parts, 0.5, 1e-12, backend=backend)
    params = clones(case.params)
    ops.perturb(params, v, epsilon, ops.PLUS, backend=backend)
    plus = clones(params)
    ops.perturb(params, v, epsilon, ops.MINUS, backend=backend)
    ops.central_difference(plus, params, [], epsilon, norm, backend=backend)
    restored = clones(params)
    ops.restore(restored, v, backend=backend)
    assert all(map(identical, restored, case.params))
    return [*v, *moments, *scaled, *parts, norm, epsilon, *params, *plus]


@needs_cpu_kernels
def test_same_bits_for_any_number_of_threads_and_in_every_run() -> None:
    first = everything("cpu", threads=1)
    for threads in (1, 2, 2, 3):
        assert all(map(identical, everything("cpu", threads), first))


# Errors


def adam_call(**changes: Any) -> Callable[[str], object]:
    def call(backend: str) -> object:
        case = Adam([(4, 3), (5,)], F32, F32)
        lists: dict[str, Any] = {
            "v": case.v, "grads": case.grads, "exp_avgs": case.exp_avgs, "exp_avg_sqs": case.exp_avg_sqs,
            "max_exp_avg_sqs": [], "params": [], "steps": case.steps,
        }  # fmt: skip
        arguments = {**lists, **case.scalars, **changes}
        before = clones(arguments["v"])
        try:
            return ops.adapt_norm_adam(**arguments, backend=backend)
        finally:
            assert all(map(identical, arguments["v"], before))

    return call


def moments_call(variant: Variant, **changes: Any) -> Callable[[str], object]:
    def call(backend: str) -> object:
        case = Moments([(4, 3), (5,)], F32, F32, variant)
        arguments = dict(zip(LISTS, case.lists, strict=True), coefficients=case.coefficients, **case.scalars)
        arguments |= changes
        before = clones(arguments["v"])
        try:
            return ops.adapt_norm_moments(**arguments, backend=backend)
        finally:
            assert all(map(identical, arguments["v"], before))

    return call


def perturb_call(
    params: list[Tensor], v: list[Tensor], epsilon: Tensor | None = None, side: int = 0
) -> Callable[[str], object]:
    def call(backend: str) -> object:
        before = clones(params) + clones(v)
        try:
            return ops.perturb(params, v, scalar(0.1) if epsilon is None else epsilon, side, backend=backend)
        finally:
            assert all(map(torch.equal, params + v, before))

    return call


def restore_call(params: list[Tensor], v: list[Tensor]) -> Callable[[str], object]:
    def call(backend: str) -> object:
        before = clones(params)
        try:
            return ops.restore(params, v, backend=backend)
        finally:
            assert all(map(torch.equal, params, before))

    return call


def difference_call(*lists: list[Tensor], epsilon: Tensor, norm: Tensor) -> Callable[[str], object]:
    return lambda backend: ops.central_difference(*lists, epsilon, norm, backend=backend)


def ones(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


ERRORS: list[tuple[Callable[[str], object], str]] = [
    (adam_call(v=[]), "adapt_norm_adam: v is empty"),
    (adam_call(grads=[ones(4, 3)]), "adapt_norm_adam: grads has 1 tensors, but v has 2"),
    (adam_call(steps=[ones()]), "adapt_norm_adam: steps has 1 tensors, but v has 2"),
    (adam_call(steps=[ones(), ones(2)]), r"adapt_norm_adam: steps\[1\] must hold one number, but has shape \[2\]"),
    (
        adam_call(exp_avgs=[ones(4, 3), ones(6)]),
        r"adapt_norm_adam: exp_avgs\[1\] has shape \[6\], but v\[1\] has shape \[5\]",
    ),
    (
        adam_call(exp_avg_sqs=[ones(4, 3), ones(5, dtype=torch.complex64)]),
        r"exp_avg_sqs\[1\] is not float32, float64, bfloat16 or float16",
    ),
    (adam_call(max_exp_avg_sqs=[ones(4, 3)]), "max_exp_avg_sqs has 1 tensors, but v has 2"),
    (adam_call(weight_decay=0.1), "params is empty, but weight_decay needs theta"),
    (adam_call(mode=2), r"mode must be 0 \(paper\) or 1 \(exact\), not 2"),
    (adam_call(lr=ones(3)), r"lr_tensor must hold one number, but has shape \[3\]"),
    (adam_call(v=[ones(4, 1).expand(4, 3), ones(5)]), r"v\[0\] is expanded"),
    (moments_call(Variant(ops.LINEAR), v=[]), "adapt_norm_moments: v is empty"),
    (
        moments_call(Variant(ops.LINEAR), form=5),
        r"form must be 0 \(linear\), 1 \(ratio\), 2 \(centered\), 3 \(maximum\) or 4 \(delta\), not 5",
    ),
    (moments_call(Variant(ops.RATIO), grads=[]), "adapt_norm_moments: grads has 0 tensors, but v has 2"),
    (moments_call(Variant(ops.RATIO), seconds=[ones(4, 3)]), "seconds has 1 tensors, but v has 2"),
    (moments_call(Variant(ops.RATIO), firsts=[ones(4, 3)]), "firsts has 1 tensors, but v has 2"),
    (moments_call(Variant(ops.CENTERED)), "firsts has 0 tensors, but v has 2"),
    (
        moments_call(Variant(ops.MAXIMUM, True), seconds=[ones(4, 3), ones(6)]),
        r"seconds\[1\] has shape \[6\], but v\[1\]",
    ),
    (moments_call(Variant(ops.RATIO), weight_decay=0.1), "params is empty, but weight_decay needs theta"),
    *(
        (moments_call(Variant(form, True, 0.1), buffers=[ones(4, 3), ones(5)]), r"buffers .* except in form 2")
        for form in (ops.RATIO, ops.MAXIMUM, ops.DELTA)
    ),
    (moments_call(Variant(ops.DELTA)), "firsts has 0 tensors, but v has 2"),
    (moments_call(Variant(ops.RATIO, decay=0.1), buffers=[ones(4, 3)]), "buffers has 1 tensors, but v has 2"),
    (moments_call(Variant(ops.RATIO), coefficients=ones(2, 8)), "coefficients must be float64"),
    (
        moments_call(Variant(ops.LINEAR), coefficients=ones(3, 8, dtype=F64)),
        r"coefficients must be a contiguous tensor of shape \[2, 8\], not \[3, 8\]",
    ),
    (
        moments_call(Variant(ops.RATIO), coefficients=ones(8, 2, dtype=F64).t()),
        r"coefficients must be a contiguous tensor of shape \[2, 8\], not \[2, 8\]",
    ),
    (moments_call(Variant(ops.RATIO), v=[ones(4, 1).expand(4, 3), ones(5)]), r"v\[0\] is expanded"),
    (lambda b: ops.adapt_norm_scale([], 0.5, lr=ones(), backend=b), "adapt_norm_scale: v is empty"),
    (
        lambda b: ops.adapt_norm_scale([ones(2, dtype=torch.int32)], 0.5, backend=b),
        r"adapt_norm_scale: v\[0\] is not float32",
    ),
    (lambda b: ops.adapt_norm_scale([ones(2)], 0.5, lr=ones(2), backend=b), "scale_tensor must hold one number"),
    (
        lambda b: ops.step_size([ones()], 0.5, 0.0, backend=b),
        r"step_size: norm_sqs\[0\] must be float64, as adapt_norm",
    ),
    (lambda b: ops.step_size([ones(2, dtype=F64)], 0.5, 0.0, backend=b), r"norm_sqs\[0\] must hold one number"),
    (perturb_call([ones(2), ones(3)], [ones(2)]), "perturb: v has 1 tensors, but params has 2"),
    (perturb_call([ones(2), ones(3)], [ones(2), ones(1, 3)]), r"v\[1\] has shape \[1, 3\], but params\[1\]"),
    (
        perturb_call([ones(2), ones(3)], [ones(2), ones(3, dtype=F64)]),
        r"v\[1\] and params\[1\] must have the same dtype",
    ),
    (perturb_call([ones(2), ones(1).expand(3)], [ones(2), ones(3)]), r"params\[1\] is expanded"),
    (perturb_call([ones(2), ones(3)], [ones(2), ones(1).expand(3)]), r"v\[1\] is expanded"),
    (perturb_call([ones(2)], [ones(2)], epsilon=ones()), "epsilon must be float64, as step_size returns it"),
    (perturb_call([ones(2)], [ones(2)], epsilon=ones(2, dtype=F64)), "epsilon must hold one number"),
    (perturb_call([ones(2)], [ones(2)], side=2), r"side must be 0 \(plus\) or 1 \(minus\), not 2"),
    (restore_call([ones(2), ones(3)], [ones(2)]), "restore: v has 1 tensors, but params has 2"),
    (restore_call([ones(2), ones(3)], [ones(2), ones(3, dtype=BF16)]), r"v\[1\] and params\[1\] must have the same"),
    (
        difference_call([ones(2)], [ones(3)], [], epsilon=scalar(1), norm=scalar(1)),
        r"central_difference: grads_minus\[0\] has shape \[3\]",
    ),
    (
        difference_call([ones(2)], [ones(2)], [ones(2), ones(2)], epsilon=scalar(1), norm=scalar(1)),
        "explicit has 2 tensors, but grads_plus has 1",
    ),
    (
        difference_call([ones(2)], [ones(2)], [ones(2)], epsilon=ones(), norm=scalar(1)),
        "epsilon must be float64",
    ),
    (difference_call([ones(2)], [ones(2)], [ones(2)], epsilon=scalar(1), norm=ones()), "norm must be float64"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_bad_arguments_are_one_clear_error_before_anything_is_written(
    call: Callable[[str], object], message: str, backend: str
) -> None:
    with pytest.raises(RuntimeError, match=message) as caught:
        call(backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_reference_perturb_is_all_or_nothing(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory or an interrupt in the middle of the list leaves theta as it was."""
    params, v = randn([(5,)] * 3), randn([(5,)] * 3)
    before, move = clones(params), reference._move_to_plus
    calls = iter(range(3))

    def interrupted(p: Tensor, x: Tensor, epsilon: Tensor, *rest: Any) -> None:
        if next(calls) == failing:
            raise KeyboardInterrupt
        move(p, x, epsilon, *rest)

    monkeypatch.setattr(reference, "_move_to_plus", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ops.perturb(params, v, scalar(0.1), ops.PLUS, backend="reference")
    assert all(map(identical, params, before))


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_changes_are_seen_by_autograd(backend: str) -> None:
    """A graph that saved a tensor which an op then changed must refuse to run backward."""
    p = torch.randn(5, requires_grad=True)
    loss = (p * p).sum()
    with torch.no_grad():
        ops.perturb([p], [torch.randn(5)], scalar(0.1), ops.PLUS, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# torch's own checks


def op_inputs() -> dict[str, tuple[Any, ...]]:
    """Arguments for each op as it is registered."""
    case = Adam(SHAPES, F32, BF16, weight_decay=0.1, amsgrad=True)
    lists = (case.v, case.grads, case.exp_avgs, case.exp_avg_sqs, case.maxima, case.params, case.steps)
    adam = (*lists, scalar(0.1), 0.0, 0.9, 0.999, 1e-8, 0.1, False, ops.EXACT)
    moments = Moments(SHAPES, F32, BF16, Variant(ops.CENTERED, True, 0.1, True))
    return {
        "adapt_norm_adam": adam,
        "adapt_norm_moments": (*moments.lists, moments.coefficients, 0.1, False, ops.CENTERED),
        "adapt_norm_scale": (randn(SHAPES), None, 0.5),
        "step_size": ([scalar(2.0), scalar(3.0)], 1.0, 1e-12),
        "perturb": (randn(SHAPES), randn(SHAPES), scalar(0.1), ops.PLUS, ops.NEAREST, 3, True),
        "restore": (randn(SHAPES), randn(SHAPES)),
        "central_difference": (randn(SHAPES), randn(SHAPES), randn(SHAPES), scalar(0.1), scalar(1.0)),
    }


@pytest.fixture(scope="module")
def reference_ops() -> Any:
    """The same schemas and fake kernels in another namespace, where nothing compiled is registered."""
    library = torch.library.Library("sama_reference", "DEF")
    for name in op_inputs():
        op = getattr(torch.ops.sama, name).default
        library.define(str(op._schema).removeprefix("sama::"))
        library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        fake = fake_norm_sq if name.startswith("adapt_norm") else sys.modules[f"sama_kernels.ops.{name}"]._fake
        torch.library.register_fake(f"sama_reference::{name}", fake, lib=library)
    return torch.ops.sama_reference, library


@pytest.mark.parametrize("name", list(op_inputs()))
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(name: str, backend: str, reference_ops: Any) -> None:
    namespace = torch.ops.sama if backend == "cpu" else reference_ops[0]
    torch.library.opcheck(getattr(namespace, name).default, op_inputs()[name])


def run_all(backend: str) -> Callable[..., list[Tensor]]:
    """A whole meta step's worth of ops, as one function of tensors."""

    def step(
        v: list[Tensor], grads: list[Tensor], m: list[Tensor], w: list[Tensor], params: list[Tensor], t: list[Tensor],
        coefficients: Tensor,
    ) -> list[Tensor]:  # fmt: skip
        parts = [
            ops.adapt_norm_adam(
                v, grads, m, w, [], [], t, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, maximize=False,
                mode=ops.PAPER, backend=backend,
            ),
            ops.adapt_norm_moments(
                m, grads, [], w, [], [], coefficients, weight_decay=0.0, maximize=False, form=ops.RATIO,
                backend=backend,
            ),
            ops.adapt_norm_scale(grads, 2.0, backend=backend),
        ]  # fmt: skip
        norm, epsilon, degenerate = ops.step_size(parts, 0.3, 1e-12, backend=backend)
        ops.perturb(params, v, epsilon, ops.PLUS, backend=backend)
        # Not p.clone(): in torch 2.13 Inductor lets the next in-place op, of any library, write to that very clone
        # (pytorch issue 198031 and its relatives).
        plus = [1.5 * p for p in params]
        ops.perturb(params, v, epsilon, ops.MINUS, backend=backend)
        ops.central_difference(plus, params, grads, epsilon, norm, backend=backend)
        ops.restore(params, v, backend=backend)
        return [*plus, *params, norm, epsilon, degenerate.double()]

    return step


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_without_graph_breaks(backend: str, compiler: str) -> None:
    if backend == "reference" and compiler == "inductor":
        pytest.skip("compiles half a minute of C++ that is not ours")
    case = Adam([(40, 30), (7,)], F32, F32)
    params = randn([(40, 30), (7,)])
    inputs = (case.v, case.grads, case.exp_avgs, case.exp_avg_sqs, params, case.steps)
    eager_inputs, compiled_inputs = ([clones(x) for x in inputs] for _ in range(2))
    rows = torch.rand(2, ops.COEFFICIENTS, dtype=F64)
    expected = run_all(backend)(*eager_inputs, rows)
    torch.compiler.reset()
    actual = torch.compile(run_all(backend), fullgraph=True, backend=compiler)(*compiled_inputs, rows)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    for list_a, list_b in zip(compiled_inputs, eager_inputs, strict=True):
        for a, b in zip(list_a, list_b, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
