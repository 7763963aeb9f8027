"""Adadelta: u = lr delta with delta = g sqrt((a' + eps) / (s + eps)), a' the mean of squared deltas before the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sama_kernels.adaptation.general import carried

_NEWTON_STEPS = 8


def adadelta(grad: Tensor, param: Tensor, state: dict[str, Any], hyper: dict[str, Any]) -> Tensor:
    """u of `torch.optim.Adadelta`: L2 decay acts on theta before the step, which is found again from theta after it."""
    rho, eps, decay = hyper["rho"], hyper["eps"], hyper["weight_decay"]
    lr: float | Tensor = hyper["lr"]
    square_avg, acc_delta = state["square_avg"], state["acc_delta"]
    g = -grad if hyper["maximize"] else grad
    with torch.no_grad():
        # (a' + eps) as a function of what the step left, a = rho a' + (1 - rho) delta^2; free of cancellation.
        std_sq, acc = square_avg + eps, acc_delta + rho * eps
        seen = g if decay == 0 else _with_decay(g + decay * param, decay * lr, rho, std_sq, acc)
        before = acc * std_sq / (rho * std_sq + (1 - rho) * seen.square())
    g = g + (seen - g).detach()
    std = (carried(square_avg, (1 - rho) * g.square()) + eps).sqrt()
    u: Tensor = lr * before.sqrt() / std * g
    return u


def _with_decay(known: Tensor, k: float | Tensor, rho: float, std_sq: Tensor, acc: Tensor) -> Tensor:
    """The gradient x that the moments saw: x = g + decay (theta + lr delta(x)) = known + k delta(x), by Newton's
    method. It converges from x = known, as delta is concave on either side of 0 and k delta' < 1 (else the decay alone
    would carry theta beyond 0)."""
    x = known
    for _ in range(_NEWTON_STEPS):
        square = rho * std_sq + (1 - rho) * x.square()
        slope = (acc / square).sqrt()  # delta = slope x
        x = x - (x - k * slope * x - known) / (1 - k * slope * rho * std_sq / square)
    return x
