"""SGD with momentum, dampening, Nesterov, weight decay, maximize: u is linear in g, so D is one number per group."""

from __future__ import annotations

from torch import Tensor

from sama_kernels import ops
from sama_kernels.adaptation.plan import GroupStep, OpCall
from sama_kernels.adaptation.step_record import FIRST_STEP


def sgd(step: GroupStep) -> list[OpCall]:
    """D = lr * c: c = 1 without momentum; 1 - dampening with it (1 at the step that creates the buffer);
    1 + momentum (1 - dampening) under Nesterov; negative under maximize. Weight decay does not enter.

    "paper" and "exact" are the same here.
    """
    h = step.hyper
    momentum, sign = h["momentum"], -1.0 if h["maximize"] else 1.0
    rows = list(range(len(step.rows)))
    if momentum != 0:  # without a buffer the parameter was never updated
        rows = [i for i in rows if step.optimizer.state.get(step.params[i], {}).get("momentum_buffer") is not None]
    first = {i for i in rows if id(step.params[i]) in h.get(FIRST_STEP, ())}
    calls = []
    for is_first in (False, True):
        share = [step.rows[i] for i in rows if (i in first) == is_first]
        received = 1.0 if momentum == 0 or is_first else 1.0 - h["dampening"]  # how much of g enters the buffer
        c = sign * (1.0 + momentum * received if h["nesterov"] else received)
        if share:
            lr = h["lr"]
            options = {"scale": c, "lr": lr} if isinstance(lr, Tensor) else {"scale": c * lr}
            calls.append(OpCall(ops.adapt_norm_scale, share, (), options))
    return calls
