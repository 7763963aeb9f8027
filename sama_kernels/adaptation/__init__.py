"""The adaptation matrix D = du/dg of the base optimizer (paper, section 3.2): one file per optimizer family."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from sama_kernels import ops
from sama_kernels.adaptation import registry, step_record
from sama_kernels.adaptation.adadelta import adadelta
from sama_kernels.adaptation.adafactor import adafactor
from sama_kernels.adaptation.adam import adam
from sama_kernels.adaptation.constant import sign
from sama_kernels.adaptation.general import carried, general
from sama_kernels.adaptation.muon import muon
from sama_kernels.adaptation.plan import Family, GroupStep, OpCall, apply
from sama_kernels.adaptation.registry import register_adaptation, supported
from sama_kernels.adaptation.sgd import sgd
from sama_kernels.adaptation.step_record import steps_made

__all__ = ["OpCall", "apply", "carried", "plan", "register_adaptation", "steps_made", "supported"]

_families: dict[type[Optimizer], Family] = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: adam,
    torch.optim.AdamW: adam,
    torch.optim.Adadelta: general(adadelta),
    torch.optim.Adafactor: adafactor,
    torch.optim.Muon: muon,
    torch.optim.Rprop: sign,
}
registry.provide(_families)


def plan(optimizer: Optimizer | None, params: Sequence[Tensor], adaptation: str) -> list[OpCall]:
    """Decide how v = D d is computed for `params`; reads the optimizer, changes nothing.

    Raises:
        TypeError: the optimizer's exact type has no adaptation (there is no silent identity).
        ValueError: no state yet, or a `.grad` is missing where D needs it.
    """
    if adaptation == "none":
        return [OpCall(ops.adapt_norm_scale, list(range(len(params))), (), {"scale": 1.0})]
    assert optimizer is not None  # checks.problem
    family = registry.family_of(type(optimizer))
    mode = ops.EXACT if adaptation == "exact" else ops.PAPER
    row_of = {id(p): row for row, p in enumerate(params)}
    calls: list[OpCall] = []
    for group, hyper in zip(optimizer.param_groups, step_record.hyperparameters(optimizer), strict=True):
        skipped = hyper.get(step_record.SKIPPED, ())
        held = [p for p in group["params"] if id(p) in row_of and id(p) not in skipped]
        if held:
            calls += family(GroupStep(optimizer, [row_of[id(p)] for p in held], held, hyper, mode))
    if not calls:
        raise ValueError(
            "optimizer: it has no state for base_params yet; make a base step (loss.backward(); optimizer.step())"
            " before the first meta step"
        )
    return calls
