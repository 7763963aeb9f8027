"""Calls of `ops.adapt_norm_moments`: what its numbers per tensor are made of, on the host or on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sama_kernels import ops
from sama_kernels.adaptation.plan import GroupStep, OpCall
from sama_kernels.types import as_tensor
from sama_kernels.upload import upload

Number = float | Tensor
"""A number that all tensors share, or float64 numbers of all tensors, 0-dim or (tensors,)."""


def gathered(
    step: GroupStep, states: Sequence[dict[str, Any]], *keys: str
) -> tuple[Number, list[Tensor], torch.device]:
    """lr of the step, the named scalars of all `states` as float64 vectors, and where to compute with them.

    On the CPU if the optimizer keeps all of them there, where reading them costs nothing; else on the device of the
    parameters, without waiting for it.
    """
    lr = step.hyper["lr"]
    columns = [[as_tensor(state[key]).detach().reshape(()) for state in states] for key in keys]
    scalars = [x for column in columns for x in column] + ([lr] if isinstance(lr, Tensor) else [])
    place = torch.device("cpu")
    if any(x.device.type != "cpu" for x in scalars):
        place = step.params[0].device
    vectors = [torch.stack([upload(x, place) for x in column]).double() for column in columns]
    rate = upload(lr.detach().reshape(()), place).double() if isinstance(lr, Tensor) else float(lr)
    return rate, vectors, place


def rows(
    step: GroupStep, count: int, place: torch.device, *, rate: Number, slope: Number, a: Number = 0.0, b: Number = 0.0,
    kappa: Number = 0.0, omega: Number = 0.0, eps: Number = 0.0, tail: Number = 0.0,
) -> Tensor:  # fmt: skip
    """`coefficients` of `ops.adapt_norm_moments` for `count` tensors, on the device of the parameters."""
    columns = (rate, a, b, slope, kappa, omega, eps, tail)
    whole = [
        x.expand(count) if isinstance(x, Tensor) else torch.full((count,), x, dtype=torch.float64, device=place)
        for x in columns
    ]
    return upload(torch.stack(whole, dim=1), step.params[0].device)


def call(
    step: GroupStep, used: Sequence[int], coefficients: Tensor, second: str = "", first: str = "", buffer: str = "",
    *, form: int = ops.RATIO, decay: float = 0.0,
) -> OpCall:  # fmt: skip
    """The call for the parameters `used` of the group, on the entries of their state that have these names.

    decay: coupled weight decay.
    """
    states = [step.optimizer.state[step.params[i]] for i in used]

    def entries(name: str, needed: bool = True) -> list[Tensor]:
        return [state[name] for state in states] if name and needed else []

    lists = (
        [step.gradient(i) for i in used] if form != ops.LINEAR else [],
        entries(first),
        entries(second),
        [step.params[i] for i in used] if decay != 0.0 else [],
        entries(buffer, needed=decay != 0.0),
    )
    options = {"weight_decay": decay, "maximize": bool(step.hyper["maximize"]), "form": form}
    return OpCall(ops.adapt_norm_moments, [step.rows[i] for i in used], lists, options, coefficients)


def tail(step: GroupStep) -> float:
    """eps in the numerator of D: "exact" keeps it, "paper" drops it."""
    return float(step.hyper["eps"]) if step.mode == ops.EXACT else 0.0
