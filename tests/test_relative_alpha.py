"""alpha=relative(f): the step is f * ||theta|| long, found on the device, and nothing else changes."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from problems import after_steps, flat, meta_grad, relative_error, same_bits, snapshot, weight_net
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sama_kernels as sk
from sama_kernels import step_length

BACKENDS = ["cpu", "reference"]


@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_absolute_alpha_of_that_length(dtype: torch.dtype, backend: str, difference: str) -> None:
    problem = weight_net(seed=1, dtype=dtype)
    optimizer = after_steps(problem, 2)
    before = snapshot(problem.theta)
    versions = [p._version for p in problem.theta]
    length = float(flat(problem.theta).double().norm())
    options = {"backend": backend, "difference": difference}
    relative = meta_grad(problem, optimizer, alpha=sk.relative(0.03), **options)
    absolute = meta_grad(problem, optimizer, alpha=0.03 * length, **options)
    torch.testing.assert_close(
        relative.epsilon, absolute.epsilon, rtol=1e-14 if dtype == torch.float64 else 1e-6, atol=0
    )
    assert relative.epsilon.dtype == torch.float64 and relative.epsilon.shape == ()
    assert float(relative.epsilon * relative.norm) == pytest.approx(0.03 * length, rel=1e-6)
    scale = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.05}[dtype]
    assert relative_error(flat(relative.grads).double(), flat(absolute.grads).double()) < scale
    again = meta_grad(problem, optimizer, alpha=sk.relative(0.03), **options)
    assert all(torch.equal(a, b) for a, b in zip(again.grads, relative.grads, strict=True))
    assert all(same_bits(p, q) for p, q in zip(problem.theta, before, strict=True))
    assert [p._version for p in problem.theta] == versions


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_of_theta_in_mixed_dtypes_writes_nothing(backend: str) -> None:
    torch.manual_seed(0)
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    params = [torch.randn(257, 3).to(t).requires_grad_() for t in dtypes]
    params.append(torch.randn(8, 6)[:, ::2].detach().requires_grad_())  # strided
    params.append(torch.tensor([-0.0, 1e-42], requires_grad=True))
    before, versions = snapshot(tuple(params)), [p._version for p in params]
    norm = step_length.norm_of(params, backend)
    expected = torch.cat([p.detach().double().flatten() for p in params]).norm()
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    assert norm == step_length.norm_of(params, backend)
    assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))
    assert [p._version for p in params] == versions


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_of_theta_works_on_memory_that_cannot_be_written(backend: str) -> None:
    numpy = pytest.importorskip("numpy")
    numbers = numpy.memmap("/proc/self/exe", dtype=numpy.float32, mode="r", shape=(1024,), offset=4096)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that the memory is not writable
        theta = torch.from_numpy(numbers)
    assert step_length.norm_of([theta], backend).shape == ()  # a write would be a segmentation fault


def test_all_base_parameters_count_also_those_that_v_does_not_move() -> None:
    moved, still = (
        torch.ones(4, dtype=torch.float64, requires_grad=True),
        torch.full((5,), 2.0).double().requires_grad_(),
    )
    lam = torch.ones(4, dtype=torch.float64, requires_grad=True)
    out = sk.meta_grad(
        lambda: (lam * moved).sum() * still.sum(),
        lambda: moved.sum(),
        base_params=[moved, still],
        meta_params=[lam],
        optimizer=None,
        adaptation="none",
        alpha=sk.relative(0.1),
    )
    assert float(out.epsilon * out.norm) == pytest.approx(0.1 * math.sqrt(4 + 20), rel=1e-14)


@pytest.mark.parametrize("difference", ["central", "forward", "exact"])
@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_a_theta_without_length_is_degenerate(value: float, difference: str) -> None:
    w = torch.full((3,), value, requires_grad=True)
    lam = torch.ones(3, requires_grad=True)
    options: dict[str, Any] = {"optimizer": None, "adaptation": "none", "difference": difference}
    before = snapshot((w,))
    for update_base in (False, True):
        out = sk.meta_grad(
            lambda: (lam * w).sum(), lambda: (2 * w).sum(), base_params=[w], meta_params=[lam],
            alpha=sk.relative(1e-3), update_base=update_base, **options,
        )  # fmt: skip
        assert out.degenerate and out.epsilon == 0 and torch.equal(out.grads[0], torch.zeros(3))
        assert same_bits(w, before[0])


def test_update_base_moves_by_that_length() -> None:
    problem = weight_net(seed=2)
    before = flat(problem.theta)
    meta_grad(problem, None, adaptation="none", alpha=sk.relative(1e-2), update_base=True)
    assert float((flat(problem.theta) - before).norm() / before.norm()) == pytest.approx(1e-2, rel=1e-12)


def test_no_copy_to_the_host() -> None:
    """aten::_local_scalar_dense is what .item(), float() and bool() call; none before the closures run or after."""
    problem = weight_net(seed=3)
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    for difference in ("central", "forward", "exact"):
        del seen[:]
        with Watch():
            meta_grad(
                problem, None, adaptation="none", alpha=sk.relative(1e-3), difference=difference, backend="reference"
            )
        assert len(seen) > 50
        assert not [name for name in seen if "local_scalar" in name or "equal" in name or "nonzero" in name]


BAD: list[tuple[Any, type[Exception], str]] = [
    (0, ValueError, r"relative: the fraction of \|\|theta\|\| must be positive and finite, got 0"),
    (-1e-3, ValueError, r"relative: .*positive"),
    (math.nan, ValueError, r"relative: .*finite, got nan"),
    (math.inf, ValueError, r"relative: .*finite, got inf"),
    ("1e-3", TypeError, r"relative: expected a number, got str"),
    (True, TypeError, r"relative: expected a number, got bool"),
    (torch.ones(()), TypeError, r"relative: expected a number, got Tensor"),
]


@pytest.mark.parametrize(("value", "error", "message"), BAD, ids=lambda x: str(x)[:12])
def test_bad_fractions(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sk.relative(value)


def test_bad_alphas() -> None:
    problem = weight_net(seed=4)
    for value in ("relative:1e-3", torch.ones(()), None, True):
        with pytest.raises(TypeError, match=r"alpha: expected a number or sama_kernels.relative\(fraction\), got"):
            meta_grad(problem, None, adaptation="none", alpha=value)


def test_a_relative_alpha_is_a_value() -> None:
    assert sk.relative(1e-3) == sk.relative(1e-3) != sk.relative(1e-2)
    assert isinstance(sk.relative(1), sk.Relative)
    with pytest.raises(AttributeError):
        sk.relative(1e-3).fraction = 1.0  # type: ignore[misc]


def test_growing_theta_keeps_the_relative_length() -> None:
    net = nn.Linear(4, 1).double()
    lam = torch.rand(6, dtype=torch.float64, requires_grad=True)
    x: Tensor = torch.randn(6, 4, dtype=torch.float64)
    for factor in (1.0, 10.0):
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(factor)
        out = sk.meta_grad(
            lambda: (lam * net(x).squeeze(1).square()).mean(), lambda: net(x).mean(), base_params=net,
            meta_params=[lam], optimizer=None, adaptation="none", alpha=sk.relative(1e-3),
        )  # fmt: skip
        norm = float(flat(tuple(net.parameters())).norm())
        assert float(out.epsilon * out.norm) == pytest.approx(1e-3 * norm, rel=1e-12)
