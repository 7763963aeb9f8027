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
from sama_kernels.adaptation.asgd import asgd
from sama_kernels.adaptation.constant import sign
from sama_kernels.adaptation.general import carried
from sama_kernels.adaptation.maximum import adamax
from sama_kernels.adaptation.muon import muon
from sama_kernels.adaptation.plan import Family, GroupStep, OpCall, apply, gradient_of_step
from sama_kernels.adaptation.ratio import adagrad, nadam, radam, rmsprop
from sama_kernels.adaptation.registry import register_adaptation, supported
from sama_kernels.adaptation.sgd import sgd
from sama_kernels.adaptation.step_record import rounding_base, steps_made

__all__ = [
    "OpCall",
    "apply",
    "carried",
    "gradient_of_step",
    "plan",
    "register_adaptation",
    "rounding_base",
    "steps_made",
    "supported",
]

_families: dict[type[Optimizer], Family] = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: adam,
    torch.optim.AdamW: adam,
    torch.optim.Adadelta: adadelta,
    torch.optim.Adafactor: adafactor,
    torch.optim.Muon: muon,
    torch.optim.Rprop: sign,
    torch.optim.NAdam: nadam,
    torch.optim.RAdam: radam,
    torch.optim.Adagrad: adagrad,
    torch.optim.RMSprop: rmsprop,
    torch.optim.Adamax: adamax,
    torch.optim.ASGD: asgd,
}
registry.provide(_families)


def plan(
    optimizer: Optimizer | None,
    params: Sequence[Tensor],
    adaptation: str,
    *,
    name: str = "base_params",
    skipped: bool = False,
) -> list[OpCall]:
    """Decide how v = D d is computed for `params`; reads the optimizer, changes nothing.

    Arguments:
        params: those that the optimizer holds. name: of the argument they come from.
        skipped: no step was made, so that u = 0 and D = 0.
    Raises:
        TypeError: the optimizer's exact type has no adaptation (there is no silent identity).
        ValueError: no state yet, or a `.grad` is missing where D needs it.
    """
    everything = list(range(len(params)))
    if adaptation == "none":
        return [OpCall(ops.adapt_norm_scale, everything, (), {"scale": 0.0 if skipped else 1.0})]
    assert optimizer is not None  # checks.held_by
    family = registry.family_of(type(optimizer))
    if skipped:
        return [OpCall(ops.adapt_norm_scale, everything, (), {"scale": 0.0})]
    mode = ops.EXACT if adaptation == "exact" else ops.PAPER
    row_of = {id(p): row for row, p in enumerate(params)}
    calls: list[OpCall] = []
    for group, hyper in zip(optimizer.param_groups, step_record.hyperparameters(optimizer), strict=True):
        sat_out = hyper.get(step_record.SKIPPED, ())
        held = [p for p in group["params"] if id(p) in row_of and id(p) not in sat_out]
        if held:
            calls += family(GroupStep(optimizer, [row_of[id(p)] for p in held], held, hyper, mode, name))
    if not calls:
        raise ValueError(
            "optimizer: it has no state for base_params yet; make a base step (loss.backward(); optimizer.step())"
            " before the first meta step"
        )
    return calls
