"""Adadelta, whose steps take their size from those before (`ops.adapt_norm_moments`)."""

from __future__ import annotations

from sama_kernels import ops
from sama_kernels.adaptation.moments import call, gathered, rows
from sama_kernels.adaptation.plan import GroupStep, OpCall


def adadelta(step: GroupStep) -> list[OpCall]:
    """u = lr delta, delta = g sqrt((e + eps) / (w + eps)) with the mean e of delta^2 before the step (Zeiler, 2012).

    eps sets the size of the steps, so that "paper" keeps it in D.
    """
    h = step.hyper
    used, states = step.with_state("acc_delta")
    if not used:
        return []
    lr, _, place = gathered(step, states)
    rho = float(h["rho"])
    coefficients = rows(
        step, len(used), place, rate=lr, a=1.0, slope=1.0, kappa=rho, omega=1 - rho, eps=float(h["eps"]),
        tail=1.0 if step.mode == ops.EXACT else 0.0,
    )  # fmt: skip
    return [call(step, used, coefficients, "square_avg", "acc_delta", form=ops.DELTA, decay=step.coupled_decay())]
