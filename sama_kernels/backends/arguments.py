"""What the ops accept: the codes of their options, and the checks that run before anything is written.

The backends in Python share them. The compiled kernels have their own, with the same messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

PAPER, EXACT = 0, 1
"""Modes of `adapt_norm_adam`: the epsilon-free numerator of the paper, or the derivative to the letter."""
LINEAR, RATIO, CENTERED, MAXIMUM, DELTA = 0, 1, 2, 3, 4
"""Forms of `adapt_norm_moments`."""
COEFFICIENTS = 8
"""Numbers that `adapt_norm_moments` takes for each tensor."""
PLUS, MINUS = 0, 1
"""Sides of `perturb`."""
NEAREST, STOCHASTIC = 0, 1
"""Roundings of `perturb`."""

_STORAGE = {torch.float32, torch.float64, torch.bfloat16, torch.float16}


def check_adapt_norm_adam(
    v: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    params: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr_tensor: Tensor | None,
    weight_decay: float,
    mode: int,
) -> None:
    op = "adapt_norm_adam"
    if not v:
        raise RuntimeError(f"sama::{op}: v is empty")
    lists = {"v": v, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if max_exp_avg_sqs:
        lists["max_exp_avg_sqs"] = max_exp_avg_sqs
    if weight_decay != 0.0:
        if not params:
            raise RuntimeError(f"sama::{op}: params is empty, but weight_decay needs theta")
        lists["params"] = params
    if mode not in (PAPER, EXACT):
        raise RuntimeError(f"sama::{op}: mode must be 0 (paper) or 1 (exact), not {mode}")
    if len(steps) != len(v):
        raise RuntimeError(f"sama::{op}: steps has {len(steps)} tensors, but v has {len(v)}")
    check_lists(op, lists, written=("v",))
    check_scalars(op, "steps", steps)
    if lr_tensor is not None:
        check_scalar(op, "lr_tensor", lr_tensor)


def check_adapt_norm_scale(v: Sequence[Tensor], scale_tensor: Tensor | None) -> None:
    op = "adapt_norm_scale"
    if not v:
        raise RuntimeError(f"sama::{op}: v is empty")
    check_lists(op, {"v": v}, written=("v",))
    if scale_tensor is not None:
        check_scalar(op, "scale_tensor", scale_tensor)


def check_adapt_norm_moments(
    v: Sequence[Tensor],
    grads: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    params: Sequence[Tensor],
    buffers: Sequence[Tensor],
    coefficients: Tensor,
    weight_decay: float,
    form: int,
) -> dict[str, Sequence[Tensor]]:
    """Returns the lists that the op reads, in the order in which the kernels take them."""
    op = "adapt_norm_moments"
    if not v:
        raise RuntimeError(f"sama::{op}: v is empty")
    if form not in (LINEAR, RATIO, CENTERED, MAXIMUM, DELTA):
        names = "0 (linear), 1 (ratio), 2 (centered), 3 (maximum) or 4 (delta)"
        raise RuntimeError(f"sama::{op}: form must be {names}, not {form}")
    lists = {"v": v}
    if form != LINEAR:
        lists["grads"] = grads
        if firsts or form != RATIO:
            lists["firsts"] = firsts
        lists["seconds"] = seconds
    if form != LINEAR and weight_decay != 0.0:
        if not params:
            raise RuntimeError(f"sama::{op}: params is empty, but weight_decay needs theta")
        lists["params"] = params
        if buffers:
            if "firsts" in lists and form != CENTERED:
                raise RuntimeError(f"sama::{op}: buffers do not go with firsts, except in form 2 (centered)")
            lists["buffers"] = buffers
    check_lists(op, lists, written=("v",))
    if coefficients.dtype != torch.float64:
        raise RuntimeError(f"sama::{op}: coefficients must be float64")
    if coefficients.shape != (len(v), COEFFICIENTS) or not coefficients.is_contiguous():
        raise RuntimeError(
            f"sama::{op}: coefficients must be a contiguous tensor of shape [{len(v)}, {COEFFICIENTS}], not"
            f" {list(coefficients.shape)}"
        )
    if coefficients.device != v[0].device:
        raise RuntimeError(f"sama::{op}: coefficients is on {coefficients.device}, but v[0] is on {v[0].device}")
    return lists


def check_step_size(norm_sqs: Sequence[Tensor]) -> None:
    if not norm_sqs:
        raise RuntimeError("sama::step_size: norm_sqs is empty")
    check_scalars("step_size", "norm_sqs", norm_sqs, float64_from="adapt_norm")


def check_perturb(params: Sequence[Tensor], v: Sequence[Tensor], epsilon: Tensor, side: int, rounding: int) -> None:
    if side not in (PLUS, MINUS):
        raise RuntimeError(f"sama::perturb: side must be 0 (plus) or 1 (minus), not {side}")
    if rounding not in (NEAREST, STOCHASTIC):
        raise RuntimeError(f"sama::perturb: rounding must be 0 (nearest) or 1 (stochastic), not {rounding}")
    check_lists("perturb", {"params": params, "v": v}, written=("params", "v"), same_dtype=True)
    if side == PLUS:
        check_scalar("perturb", "epsilon", epsilon, float64_from="step_size")


def check_restore(params: Sequence[Tensor], v: Sequence[Tensor]) -> None:
    check_lists("restore", {"params": params, "v": v}, written=("params",), same_dtype=True)


def check_central_difference(
    grads_plus: Sequence[Tensor],
    grads_minus: Sequence[Tensor],
    explicit: Sequence[Tensor],
    epsilon: Tensor,
    norm: Tensor,
) -> None:
    op = "central_difference"
    lists = {"grads_plus": grads_plus, "grads_minus": grads_minus}
    if explicit:
        lists["explicit"] = explicit
    check_lists(op, lists, written=("grads_plus",))
    check_scalar(op, "epsilon", epsilon, float64_from="step_size")
    check_scalar(op, "norm", norm, float64_from="step_size")


def share_dense_layout(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors of one shape have the same strides and fill a stretch of memory without holes or overlaps.

    Element-wise ops may then number the elements in memory order, whatever the order of the dimensions.
    """
    first = _strides(tensors[0])
    return all(_strides(x) == first for x in tensors[1:]) and _is_dense(tensors[0])


def check_lists(
    op: str, lists: Mapping[str, Sequence[Tensor]], written: Sequence[str], same_dtype: bool = False
) -> None:
    """Lengths, shapes, dtypes and layouts."""
    if _all_in_order(lists, written, same_dtype):
        return
    first_name, first = next(iter(lists.items()))
    for name, tensors in lists.items():
        if len(tensors) != len(first):
            raise RuntimeError(f"sama::{op}: {name} has {len(tensors)} tensors, but {first_name} has {len(first)}")
        for i, (x, like) in enumerate(zip(tensors, first, strict=True)):
            if x.dtype not in _STORAGE:
                raise RuntimeError(f"sama::{op}: {name}[{i}] is not float32, float64, bfloat16 or float16")
            if x.shape != like.shape:
                shapes = f"{name}[{i}] has shape {list(x.shape)}, but {first_name}[{i}] has shape {list(like.shape)}"
                raise RuntimeError(f"sama::{op}: {shapes}")
            if same_dtype and x.dtype != like.dtype:
                raise RuntimeError(f"sama::{op}: {name}[{i}] and {first_name}[{i}] must have the same dtype")
            if name in written and x.numel() > 1 and _expanded(x):
                raise RuntimeError(
                    f"sama::{op}: {name}[{i}] is expanded: several elements share one place in memory, so it cannot be"
                    " changed in place; clone it"
                )


def _all_in_order(lists: Mapping[str, Sequence[Tensor]], written: Sequence[str], same_dtype: bool) -> bool:
    """The usual case, list by list, which is quicker; False if `check_lists` has to look closer."""
    first = next(iter(lists.values()))
    shapes, dtypes = [x.shape for x in first], [x.dtype for x in first]
    for i, (name, tensors) in enumerate(lists.items()):
        # Not `tensors is first`, which Dynamo of torch 2.11 does not trace.
        own = [x.dtype for x in tensors] if i else dtypes
        if not _STORAGE.issuperset(own) or (same_dtype and own != dtypes):
            return False
        if i and [x.shape for x in tensors] != shapes:
            return False
        if name in written and not all(x.is_contiguous() for x in tensors):
            return False
    return True


def check_scalars(op: str, name: str, tensors: Sequence[Tensor], float64_from: str | None = None) -> None:
    for i, x in enumerate(tensors):
        if float64_from is not None or x.numel() != 1:  # without making 2,000 names
            check_scalar(op, f"{name}[{i}]", x, float64_from)


def check_scalar(op: str, name: str, x: Tensor, float64_from: str | None = None) -> None:
    if float64_from is not None and x.dtype != torch.float64:
        raise RuntimeError(f"sama::{op}: {name} must be float64, as {float64_from} returns it")
    if x.numel() != 1:
        raise RuntimeError(f"sama::{op}: {name} must hold one number, but has shape {list(x.shape)}")


def _expanded(x: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))


def _strides(x: Tensor) -> list[int]:
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1]


def _is_dense(x: Tensor) -> bool:
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True
