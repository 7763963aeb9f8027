"""Adafactor, torch's and transformers': factored second moments and an RMS clip, so that D is not diagonal."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sama_kernels.adaptation import step_record
from sama_kernels.adaptation.general import carried, general, scalar
from sama_kernels.adaptation.plan import GroupStep, OpCall
from sama_kernels.types import as_tensor


def adafactor(step: GroupStep) -> list[OpCall]:
    """`torch.optim.Adafactor`. Its eps[0], where None, is that of the dtype of the group's first parameter."""
    eps1, eps2 = step.hyper["eps"]
    if eps1 is None:
        group = next(g for g in step.optimizer.param_groups if any(p is step.params[0] for p in g["params"]))
        skipped = step.hyper.get(step_record.SKIPPED, ())
        eps1 = torch.finfo(next(p.dtype for p in group["params"] if id(p) not in skipped)).eps
    return general(_update)(replace(step, hyper={**step.hyper, "eps": (eps1, eps2)}))


def _update(grad: Tensor, param: Tensor, state: dict[str, Any], hyper: dict[str, Any]) -> Tensor:
    g = -grad if hyper["maximize"] else grad
    eps1, eps2 = hyper["eps"]
    t, lr = scalar(state["step"], g), scalar(hyper["lr"], g)
    rate = t ** hyper["beta2_decay"]  # 1 - beta2
    square = g.square()
    if g.dim() > 1:
        row = carried(state["row_var"], rate * square.mean(-1, keepdim=True))
        column = carried(state["col_var"], rate * square.mean(-2, keepdim=True))
        variance = row @ column / row.mean(-2, keepdim=True).clamp(min=eps1)
    else:
        variance = carried(state["variance"], rate * square)
    direction = g * variance.clamp(min=eps1 * eps1).rsqrt()
    direction = direction / _clip(direction, hyper["d"])
    rho = torch.minimum(lr, t.rsqrt())
    with torch.no_grad():
        rms = _rms_before(param, direction * rho, 1 - lr * hyper["weight_decay"])
    u: Tensor = rms.clamp(min=eps2) * rho * direction
    return u


def _clip(x: Tensor, threshold: float) -> Tensor:
    """The divisor of the update clip."""
    rms: Tensor = torch.linalg.vector_norm(x) / (math.sqrt(x.numel()) * threshold)
    return rms.clamp(min=1.0)


def _rms_before(param: Tensor, direction: Tensor, kept: Tensor) -> Tensor:
    """The root mean square r of theta before the step, from theta after it.

    theta = kept theta' - r direction, so that r solves ||theta + r direction||^2 = n kept^2 r^2: a quadratic equation
    with one positive root, as long as a step moves a parameter by less than its own size (else NaN: degenerate). Where
    r is below eps[1], and eps[1] took its place, the root is below it too.
    """
    a = param.numel() * kept.square() - _square_sum(direction)
    b, c = (param * direction).sum(dtype=torch.float64), _square_sum(param)
    return torch.where(a > 0, (b + (b.square() + a * c).sqrt()) / a, torch.nan)


def _square_sum(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.square()


def transformers_adafactor(grad: Tensor, param: Tensor, state: dict[str, Any], hyper: dict[str, Any]) -> Tensor:
    """u of `transformers.optimization.Adafactor`, which keeps the root mean square of theta before the step.

    In float64: its eps[0] of 1e-30 lets moments through whose power -1.5, the derivative, is beyond float32 (1e-27 for
    the biases of BERT's keys, which softmax does not see).
    """
    t, (eps1, eps2) = state["step"], hyper["eps"]
    grad = grad.double()
    state = {key: x.double() if isinstance(x, Tensor) else x for key, x in state.items()}
    lr: float | Tensor = _transformers_lr(t, hyper)
    if hyper["scale_parameter"]:
        lr = lr * as_tensor(state["RMS"]).clamp(min=eps2)
    rate = t ** hyper["decay_rate"]  # 1 - beta2
    square = grad.square() + eps1
    if grad.dim() > 1:
        row = carried(state["exp_avg_sq_row"], rate * square.mean(-1))
        column = carried(state["exp_avg_sq_col"], rate * square.mean(-2))
        direction = grad * (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * column.unsqueeze(-2).rsqrt()
    else:
        direction = grad * carried(state["exp_avg_sq"], rate * square).rsqrt()
    update = lr * direction / _clip(direction, hyper["clip_threshold"])
    return update if hyper["beta1"] is None else carried(state["exp_avg"], (1 - hyper["beta1"]) * update)


def _transformers_lr(t: int, hyper: dict[str, Any]) -> float | Tensor:
    if not hyper["relative_step"]:
        given: float | Tensor = hyper["lr"]
        return given
    return min(1e-6 * t if hyper["warmup_init"] else 1e-2, 1.0 / math.sqrt(t))
