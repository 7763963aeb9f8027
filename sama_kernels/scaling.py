"""Mixed precision: the scale of a GradScaler, steps that it skipped, and the factors that v was computed without.

float16 gradients underflow, so a GradScaler multiplies the base loss by S. The meta loss and both perturbed losses are
multiplied by the same S. Everything is linear in them: pass 1 gives S d, hence S v, and passes 2 and 3 give S times the
gradients of lambda. The factor c of gradient clipping (`clipping`) is likewise left out of v. Neither changes theta+-,
which depends on the direction of v alone; both enter the difference quotient and the reported norm, in float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from sama_kernels import step_length
from sama_kernels.adaptation import step_record
from sama_kernels.types import Problem

PATIENCE = 10
"""So many meta steps in a row without a base step of today's gradients are no overflows, but a mistake."""
_idle: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()


def scale_of(grad_scaler: Any, device: torch.device) -> Tensor | None:
    """S as a float32 0-dim tensor on `device`; None without a scaler, or with a disabled one."""
    if grad_scaler is None:
        return None
    if not isinstance(grad_scaler, torch.amp.GradScaler):
        raise TypeError(f"grad_scaler: expected a torch.amp.GradScaler, got {type(grad_scaler).__name__}")
    if not grad_scaler.is_enabled():
        return None
    scale: Tensor = grad_scaler.scale(torch.ones((), device=device))
    return scale


def step_skipped(optimizer: Optimizer | None, params: Sequence[Tensor], scaled: bool, name: str) -> bool | Tensor:
    """Whether the base step was skipped because gradients had overflowed; found without waiting for the device.

    A fused optimizer's step runs idle, with a flag on the device. Any other optimizer's is never called, so `.grad` is
    not what it was after the optimizer's last step: the sign of it after `GradScaler.update()`, too.

    Arguments:
        params: what the optimizer steps, the argument `name`. scaled: whether a GradScaler makes the steps.
    Returns: a bool, or a tensor that is not 0 if the step was skipped.
    Raises:
        ValueError: a `.grad` of the step is gone, so that one cannot tell.
    """
    if optimizer is None:
        return False
    if scaled:
        idle = not step_record.step_seen(optimizer) or not _made_with_todays_gradients(optimizer, params, name)
        _idle[optimizer] = _idle.get(optimizer, 0) + 1 if idle else 0
        if _idle[optimizer] == PATIENCE:
            warnings.warn(
                f"grad_scaler: {PATIENCE} meta steps in a row found no optimizer step made with today's .grad and were"
                " degenerate; call meta_grad right after grad_scaler.step(optimizer), before another backward()",
                stacklevel=3,
            )
        if idle:
            return True
    found_inf = step_record.found_inf(optimizer)
    return False if found_inf is None else found_inf


def _made_with_todays_gradients(optimizer: Optimizer, params: Sequence[Tensor], name: str) -> bool:
    rows = {id(p): row for row, p in enumerate(params)}
    for group, hyper in zip(optimizer.param_groups, step_record.hyperparameters(optimizer), strict=True):
        for p in group["params"]:
            if id(p) not in rows or step_record.unchanged(hyper, p):
                continue
            if p.grad is None:
                raise ValueError(
                    f"{name}: tensor {rows[id(p)]} (shape {tuple(p.shape)}) has no .grad, without which a skipped step"
                    " cannot be told from one that was made; call meta_grad after grad_scaler.step(optimizer) and"
                    " before zero_grad()"
                )
            return False
    return True


@dataclass(frozen=True)
class StepSize:
    """Step 3 of a meta step; all 0-dim, on the parameters' device.

    Attributes:
        norm, epsilon, degenerate: the fields of `MetaGradient`, of v with all its factors.
        along: what v as it is stored is multiplied by: theta+- = theta +- along v; 0 if degenerate.
        quotient: what the difference of the two scaled gradients is divided by, twice; 0 if degenerate.
        explicit: finite if the explicit gradient is to be added (the last argument of `ops.central_difference`).
    """

    norm: Tensor
    epsilon: Tensor
    degenerate: Tensor
    along: Tensor
    quotient: Tensor
    explicit: Tensor


def step_size(problem: Problem, norm_sqs: Sequence[Tensor]) -> StepSize:
    """epsilon = alpha / ||v|| for v = c (v as stored) / S."""
    norm, along, degenerate = step_length.step_size(problem, norm_sqs)
    epsilon = quotient = along
    explicit = norm
    coef, scale = problem.clipping.coef, problem.loss_scale
    if coef is not None or scale is not None:
        factor = torch.ones_like(norm) if coef is None else coef
        factor = factor if scale is None else factor / scale
        norm = explicit = norm * factor
        degenerate = degenerate | ~(norm.isfinite() & (norm > problem.tiny))
        along = torch.where(degenerate, 0.0, along)
        epsilon = torch.where(degenerate, 0.0, along / factor)
        quotient = epsilon if scale is None else epsilon * scale
    size = StepSize(norm, epsilon, degenerate, along, quotient, explicit)
    if problem.skipped is False:
        return size
    flag = problem.skipped if isinstance(problem.skipped, Tensor) else torch.ones_like(norm)
    skipped = flag.to(norm.device) != 0
    return without(replace(size, norm=torch.where(skipped, 0.0, norm)), skipped)


def overflow(problem: Problem, grads: Sequence[Tensor]) -> Tensor | None:
    """Whether scaled gradients overflowed, of which these meta gradients are made; None without a scale."""
    if problem.loss_scale is None:
        return None
    return ~torch.stack([g.isfinite().all() for g in grads]).all()


def explicit_terms(problem: Problem, grads: Sequence[Tensor | None], share: float | Tensor) -> list[Tensor]:
    """The explicit gradients of the scaled meta loss that are there, times `share` and without the scale; 16-bit ones
    then as float32, so that they do not underflow again."""
    scale, found = problem.loss_scale, [g for g in grads if g is not None]
    if scale is None and isinstance(share, float) and share == 1.0:
        return found
    factor = share if scale is None else share / scale
    return [(g.float() if g.element_size() == 2 else g) * factor for g in found]


def without(size: StepSize, bad: Tensor) -> StepSize:
    """`size`, but degenerate where `bad`."""
    zeroed = {name: torch.where(bad, 0.0, getattr(size, name)) for name in ("epsilon", "along", "quotient")}
    return replace(
        size, degenerate=size.degenerate | bad, explicit=torch.where(bad, torch.nan, size.explicit), **zeroed
    )
