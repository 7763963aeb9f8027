"""Gradient clipping between backward and step: D is taken at the clipped gradient, and v gets what clipping adds.

With the raw gradient g, the clipped one g_c (which is what the optimizer saw, and what `.grad` holds) and the update
u(g_c), du/dg is D(g_c) dg_c/dg, so v = (dg_c/dg)^T x with x = D d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sama_kernels import checks
from sama_kernels.adaptation import gradient_of_step, step_record
from sama_kernels.backends.reference import compute_dtype
from sama_kernels.distributed.sharded import local, whole
from sama_kernels.types import Clipping, Problem, as_tensor

_GUARD = 1e-6  # what torch.nn.utils.clip_grad_norm_ adds to the norm before it divides


def clip_coef(total_norm: float | Tensor, max_norm: float) -> Tensor:
    """The factor by which `torch.nn.utils.clip_grad_norm_` multiplied the gradients: min(1, max_norm / (norm + 1e-6)).

    Arguments:
        total_norm: what clip_grad_norm_ returned, the norm before clipping; 0-dim (a DTensor with sharded parameters).
        max_norm: what it was given.
    Returns: 0-dim, in the dtype and on the device of `total_norm`; for `clip_coef=` of `meta_grad`.
    """
    checks.positive("max_norm", max_norm)
    return (max_norm / (whole(as_tensor(total_norm)) + _GUARD)).clamp(max=1.0)


def checked(coef: Any, rank_one: bool, value: Any, device: torch.device) -> Clipping:
    """The arguments `clip_coef`, `clip_rank_one` and `clip_value` of `meta_grad`."""
    if rank_one and coef is None:
        raise ValueError(
            "clip_rank_one: it is the derivative of the norm in clip_coef, which is missing; pass"
            " clip_coef=sk.clip_coef(total_norm, max_norm)"
        )
    if coef is not None and value is not None:
        raise ValueError(
            "clip_value, clip_coef: only one kind of clipping is supported, as the result depends on their order; clip"
            " the gradients by norm or by value"
        )
    if isinstance(coef, Tensor):
        if coef.numel() != 1 or not coef.dtype.is_floating_point:
            raise ValueError(f"clip_coef: expected one floating-point number, got {coef.dtype} {tuple(coef.shape)}")
        coef = whole(coef.detach()).reshape(()).to(device=device, dtype=torch.float64, non_blocking=True)
    elif coef is not None:
        coef = torch.full((), checks.positive("clip_coef", coef), dtype=torch.float64, device=device)
    return Clipping(
        coef=None if coef is None else coef.clamp(max=1.0),  # as in torch: gradients are never made larger
        rank_one=bool(rank_one),
        value=None if value is None else checks.positive("clip_value", value),
    )


def gradients(problem: Problem) -> list[Tensor | None]:
    """The clipped gradients of the step, one per base parameter; None where there was none, or if none is needed."""
    clipping = problem.clipping
    if problem.skipped is True or not (clipping.rank_one or clipping.value is not None):
        return [None] * len(problem.base_params)
    records: dict[int, dict[str, Any]] = {}
    if problem.optimizer is not None:
        groups = zip(problem.optimizer.param_groups, step_record.hyperparameters(problem.optimizer), strict=True)
        records = {id(p): hyper for group, hyper in groups for p in group["params"]}
    found: list[Tensor | None] = []
    for row, p in enumerate(problem.step_params):
        hyper = records.get(id(p), {})
        sat_out = p.grad is None and id(p) in hyper.get(step_record.SKIPPED, ())
        found.append(None if sat_out else local(gradient_of_step(p, hyper, problem.step_params_name, row)))
    return found


def apply(
    problem: Problem, grads: Sequence[Tensor | None], v: list[Tensor | None], norm_sqs: list[Tensor]
) -> list[Tensor]:
    """v <- (dg_c/dg)^T v in place, up to the factor clip_coef, which `scaling` accounts for.

    Arguments:
        grads: from `gradients`. v: D d; entries may become tensors that were None.
        norm_sqs: the parts of ||v||^2, float64, 0-dim.
    Returns: the parts of the new ||v||^2, summed in a fixed order.
    """
    clipping = problem.clipping
    if problem.skipped is True:
        return norm_sqs
    if clipping.value is not None:
        _by_value(grads, v, clipping.value)
    elif clipping.rank_one:
        _by_norm(problem.base_params, grads, v, clipping.coef)
    else:
        return norm_sqs
    return [_norm_sq(x) for x in v if x is not None] or norm_sqs


def _by_value(grads: Sequence[Tensor | None], v: Sequence[Tensor | None], value: float) -> None:
    """clamp(g, -value, value): its derivative is 0 where it acted, which left exactly +-value in the dtype of g."""
    for g, x in zip(grads, v, strict=True):
        if g is not None and x is not None:
            x.masked_fill_(g.detach().abs() >= value, 0)


def _by_norm(
    params: Sequence[Tensor], grads: Sequence[Tensor | None], v: list[Tensor | None], coef: Tensor | None
) -> None:
    """v <- v - ghat <ghat, v> n / (n + 1e-6) where the norm was clipped (c < 1); ghat = g_c / ||g_c||.

    With g_c = c(n) g, n = ||g|| and c = M / (n + 1e-6): dg_c/dg = c I + g (dc/dg)^T and dc/dg = -c / (n + 1e-6) g / n.
    It mixes all parameters, so those that the meta loss does not read get an entry of v too.
    """
    assert coef is not None
    square, product = (torch.zeros((), dtype=torch.float64, device=coef.device) for _ in range(2))
    for g, x in zip(grads, v, strict=True):
        if g is not None:
            square += _norm_sq(g.detach())
            if x is not None:
                product += (g.detach().double() * x.double()).sum()
    n = square.sqrt() / coef  # of the raw gradient
    share = product / square * (n / (n + _GUARD))
    share = torch.where((coef < 1) & (square > 0), share, 0.0)
    for i, g in enumerate(grads):
        if g is not None:
            entry = v[i]
            x = torch.zeros_like(params[i], requires_grad=False) if entry is None else entry
            dtype = compute_dtype(x.dtype)
            v[i] = x.copy_(x.to(dtype) - g.detach().to(dtype) * share.to(dtype))


def _norm_sq(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.square()
