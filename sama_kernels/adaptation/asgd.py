"""ASGD: u = eta (g + lambd theta) is linear in g, with a step size eta per parameter."""

from __future__ import annotations

import torch
from torch import Tensor

from sama_kernels import ops
from sama_kernels.adaptation.moments import Number, call, gathered, rows
from sama_kernels.adaptation.plan import GroupStep, OpCall
from sama_kernels.adaptation.step_record import ETAS


def asgd(step: GroupStep) -> list[OpCall]:
    """D = eta of the step: neither lambd theta nor weight decay enters, and "paper" and "exact" are the same.

    The state has the next step's eta already, so that of this step is taken from the record made before it. Without a
    record it is lr / (1 + lambd lr (t - 1))^alpha, which assumes that lr was the same one step earlier.
    """
    h = step.hyper
    used, states = step.with_state("eta")
    if not used:
        return []
    ids = [id(step.params[i]) for i in used]
    if ETAS in h:
        etas = [h[ETAS].get(key) for key in ids]
        states = [
            {"eta": _first(h["lr"], state["eta"]) if eta is None else eta}
            for eta, state in zip(etas, states, strict=True)
        ]
        _, (eta,), place = gathered(step, states, "eta")
    else:
        lr, (t,), place = gathered(step, states, "step")
        eta = lr / (1 + h["lambd"] * lr * (t - 1)) ** h["alpha"]
    coefficients = rows(step, len(used), place, rate=eta, slope=1.0)
    return [call(step, used, coefficients, form=ops.LINEAR)]


def _first(lr: Number, like: Tensor) -> Tensor:
    """eta of a first step, as torch creates it."""
    return lr.to(like) if isinstance(lr, Tensor) else torch.full_like(like, lr)
