"""Adamax, which divides by a running maximum (`ops.adapt_norm_moments`)."""

from __future__ import annotations

from torch import Tensor

from sama_kernels import ops
from sama_kernels.adaptation.moments import call, gathered, rows, tail
from sama_kernels.adaptation.plan import GroupStep, OpCall


def adamax(step: GroupStep) -> list[OpCall]:
    """u = lr / (1 - beta1^t) m / n with n = max(beta2 n, |g| + eps) (Kingma and Ba, "Adam", 2015, section 7.1)."""
    h = step.hyper
    used, states = step.with_state("exp_inf")
    if not used:
        return []
    lr, (t,), place = gathered(step, states, "step")
    beta1 = float(h["betas"][0])
    rate = lr / (1 - beta1**t)
    if isinstance(h["lr"], Tensor):  # torch divides in its dtype
        rate = rate.to(h["lr"].dtype).double()
    coefficients = rows(step, len(used), place, rate=rate, b=1.0, slope=1 - beta1, eps=float(h["eps"]), tail=tail(step))
    return [call(step, used, coefficients, "exp_inf", "exp_avg", form=ops.MAXIMUM, decay=step.coupled_decay())]
