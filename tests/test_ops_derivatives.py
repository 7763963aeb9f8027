"""The ops have no derivative: where autograd would go past one it is an error, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_cases import F64
from test_ops_contract import BACKENDS, ones, scalar
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from sama_kernels import ops


def recorded_backward(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def recorded_forward(x: Tensor) -> Tensor:
    return forward_ad.make_dual(x, torch.ones_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("record", [recorded_backward, recorded_forward])
def test_no_derivative_goes_past_an_op(backend: str, record: Callable[[Tensor], Tensor]) -> None:
    """Each op, each of its lists and scalars in which autograd may be interested."""
    x, at = [ones(4, 3)], {"epsilon": scalar(0.1), "norm": scalar(1.0)}
    adam = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "mode": ops.PAPER, "steps": [ones()]}
    coefficients = {"coefficients": torch.rand(1, ops.COEFFICIENTS, dtype=F64)}
    moments = {**dict.fromkeys(("v", "grads", "firsts", "seconds", "params"), x), **coefficients}
    codes = [torch.zeros(12, dtype=torch.uint8)], [ones(1)], [torch.linspace(-1, 1, 256)]
    quantised = dict(zip(("codes", "scales", "tables"), codes, strict=True))
    low_bit = {f"{moment}_{part}": x for moment in ("exp_avg", "exp_avg_sq") for part, x in quantised.items()}
    state = {"exp_avgs": x, "exp_avg_sqs": x, "max_exp_avg_sqs": x, "params": x, "lr": ones()}
    calls: list[tuple[Callable[..., object], dict[str, Any], dict[str, Any]]] = [
        (ops.adapt_norm_adam, {"v": x, "grads": x, **state}, {**adam, "weight_decay": 0.1, "maximize": False}),
        (ops.adapt_norm_low_bit_adam, {"v": x, "grads": x, "lr": ones()}, {**adam, **low_bit, "block_size": 256}),
        (ops.adapt_norm_scale, {"v": x, "lr": ones()}, {"scale": 0.5}),
        (ops.adapt_norm_moments, moments, {"buffers": [], "weight_decay": 0.1, "maximize": False, "form": ops.RATIO}),
        (ops.step_size, {"norm_sqs": [scalar(2.0)]}, {"alpha": 1.0, "tiny": 0.0}),
        (ops.perturb, {"params": x, "v": x, "epsilon": at["epsilon"]}, {"side": ops.PLUS}),
        (ops.restore, {"params": x, "v": x}, {}),
        (ops.central_difference, {"grads_plus": x, "grads_minus": x, "explicit": x, **at}, {}),
    ]  # fmt: skip
    for op, tensors, others in calls:
        for name in tensors:
            with forward_ad.dual_level():
                given = tree_map(torch.clone, tensors) | {name: tree_map(record, tensors[name])}
                with pytest.raises(RuntimeError, match=rf"{op.__name__}: {name}\[0\] takes part in a derivative"):
                    op(**given, **others, backend=backend)
                pairs = zip(tree_leaves(given), tree_leaves(tensors), strict=True)
                assert all(torch.equal(a.detach(), b) for a, b in pairs)
        with torch.no_grad():
            op(**tree_map(recorded_backward, tensors), **others, backend=backend)


def test_function_transforms_are_told_as_well() -> None:
    def norm(x: Tensor) -> Tensor:
        return ops.adapt_norm_scale([2 * x], 0.5, backend="reference")

    for transform in (torch.func.grad(norm), lambda x: torch.func.jvp(norm, (x,), (x,))):
        with pytest.raises(RuntimeError, match=r"v\[0\] takes part in a derivative, and the op has none"):
            transform(ones(3))
