"""Muon: u = lr' NS(B~), Newton-Schulz iterations on the momentum, which mix all cells of a matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sama_kernels.adaptation.general import carried, general
from sama_kernels.adaptation.plan import GroupStep, OpCall


def muon(step: GroupStep) -> list[OpCall]:
    """The transposed derivative of the update in real numbers, at the momentum that the optimizer keeps.

    torch rounds the iteration to bfloat16; such a staircase has no derivative of its own, so that of the unrounded
    iteration is taken.
    """
    if not step.hyper["nesterov"]:
        for i in range(len(step.params)):
            if step.gradient(i).dtype == torch.bfloat16:
                raise ValueError(
                    f"optimizer: with nesterov=False torch.optim.Muon normalises the momentum of bfloat16 parameters"
                    f" in place (base_params tensor {step.rows[i]}), so that du/dg is lost; use nesterov=True, or"
                    f' pass adaptation="none"'
                )
    return general(_update)(step)


def _update(grad: Tensor, param: Tensor, state: dict[str, Any], hyper: dict[str, Any]) -> Tensor:
    momentum = hyper["momentum"]
    buffer = carried(state["momentum_buffer"], (1 - momentum) * grad)
    direction = grad.lerp(buffer, momentum) if hyper["nesterov"] else buffer
    lr: float | Tensor = hyper["lr"] * _lr_ratio(hyper["adjust_lr_fn"], *param.shape)
    return lr * _newton_schulz(direction, hyper["ns_coefficients"], hyper["ns_steps"], hyper["eps"])


def _newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """X <- a X + (b A + c A^2) X with A = X X^T, from X = matrix / ||matrix||, on the shorter side."""
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x: Tensor = matrix.T if tall else matrix
    x = x / torch.linalg.vector_norm(x).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def _lr_ratio(rule: str | None, rows: int, columns: int) -> float:
    if rule in (None, "original"):
        return math.sqrt(max(1, rows / columns))
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    raise ValueError(f'optimizer: Muon with adjust_lr_fn={rule!r} is not known here; pass adaptation="none"')
