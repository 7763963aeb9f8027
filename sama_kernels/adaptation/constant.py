"""Optimizers whose update is a sign (Lion, Rprop): u is constant almost everywhere, so D = du/dg = 0."""

from __future__ import annotations

import warnings

from sama_kernels import ops
from sama_kernels.adaptation import step_record
from sama_kernels.adaptation.general import moved
from sama_kernels.adaptation.plan import GroupStep, OpCall

_warned: set[str] = set()


def sign(step: GroupStep) -> list[OpCall]:
    """D = 0, hence a `degenerate` result; says so once per optimizer type."""
    name = step_record.name(type(step.optimizer))
    if name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"optimizer: the update of {name} is a sign, whose derivative by the gradient is 0 almost everywhere: the"
            ' meta gradient through the base step is 0 and the result `degenerate`; pass adaptation="none" (SAMA-NA),'
            " which takes D = I",
            UserWarning,
            stacklevel=5,  # the caller of meta_grad
        )
    rows = [step.rows[i] for i in moved(step)]
    return [OpCall(ops.adapt_norm_scale, rows, (), {"scale": 0.0})] if rows else []
