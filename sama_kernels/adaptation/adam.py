"""Adam and AdamW: coupled or decoupled decay, amsgrad, maximize, any layout of the state that torch keeps."""

from __future__ import annotations

from sama_kernels import ops
from sama_kernels.adaptation.plan import GroupStep, OpCall
from sama_kernels.types import as_tensor


def adam(step: GroupStep) -> list[OpCall]:
    """D of `ops.adapt_norm_adam` (paper, Appendix C, corrected), from the optimizer's own state and `.grad`.

    Decoupled decay (AdamW) does not enter D; coupled decay does, through the effective gradient g + weight_decay theta.
    """
    h = step.hyper
    used, states = step.with_state("exp_avg")
    decay = step.coupled_decay()
    lists = (
        step.gradients(used),
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [s["max_exp_avg_sq"] for s in states] if h["amsgrad"] else [],
        [step.params[i] for i in used] if decay != 0.0 else [],
        [as_tensor(s["step"]) for s in states],
    )
    beta1, beta2 = h["betas"]
    options = {
        "lr": h["lr"],
        "beta1": float(beta1),
        "beta2": float(beta2),
        "eps": float(h["eps"]),
        "weight_decay": decay,
        "maximize": bool(h["maximize"]),
        "mode": step.mode,
    }
    return [OpCall(ops.adapt_norm_adam, [step.rows[i] for i in used], lists, options)] if used else []
