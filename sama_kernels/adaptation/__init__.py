"""The adaptation matrix D = du/dg of the base optimizer (paper, section 3.2): one file per optimizer family."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from sama_kernels import ops
from sama_kernels.adaptation import step_record
from sama_kernels.adaptation.adam import adam
from sama_kernels.adaptation.asgd import asgd
from sama_kernels.adaptation.maximum import adamax
from sama_kernels.adaptation.plan import GroupStep, OpCall, apply
from sama_kernels.adaptation.ratio import adagrad, nadam, radam, rmsprop
from sama_kernels.adaptation.sgd import sgd
from sama_kernels.adaptation.step_record import steps_made

__all__ = ["OpCall", "apply", "plan", "steps_made", "supported"]

_families: dict[type[Optimizer], Callable[[GroupStep], list[OpCall]]] = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: adam,
    torch.optim.AdamW: adam,
    torch.optim.NAdam: nadam,
    torch.optim.RAdam: radam,
    torch.optim.Adagrad: adagrad,
    torch.optim.RMSprop: rmsprop,
    torch.optim.Adamax: adamax,
    torch.optim.ASGD: asgd,
}
for _type in _families:
    step_record.watch(_type)


def supported() -> list[str]:
    """Names of the optimizer types that have an adaptation."""
    return [f"{t.__module__.rpartition('.')[0]}.{t.__name__}" for t in _families]


def plan(optimizer: Optimizer | None, params: Sequence[Tensor], adaptation: str) -> list[OpCall]:
    """Decide how v = D d is computed for `params`; reads the optimizer, changes nothing.

    Raises:
        TypeError: the optimizer's exact type has no adaptation (there is no silent identity).
        ValueError: no state yet, or a `.grad` is missing where D needs it.
    """
    if adaptation == "none":
        return [OpCall(ops.adapt_norm_scale, list(range(len(params))), (), {"scale": 1.0})]
    assert optimizer is not None  # checks.problem
    family = _families.get(type(optimizer))
    if family is None:
        raise TypeError(
            f"optimizer: no adaptation for {type(optimizer).__module__}.{type(optimizer).__qualname__} (there is one"
            f' for exactly {", ".join(supported())}); pass adaptation="none" for SAMA-NA, which takes D = I'
        )
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
