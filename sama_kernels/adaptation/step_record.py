"""The hyperparameters with which an optimizer made its last step.

A scheduler may change lr (OneCycleLR: also betas and momentum) between the step and the meta gradient, but D belongs
to the step. A global step pre-hook of torch.optim, installed when sama_kernels is imported, copies the group's
hyperparameters for the optimizer types that have an adaptation, and notes which parameters sat the step out.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_records: WeakKeyDictionary[Optimizer, list[dict[str, Any]]] = WeakKeyDictionary()
_counts: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
_types: set[type[Optimizer]] = set()

SKIPPED = "sama_skipped"
"""Key of the ids of the parameters that had no gradient at this step, so that it did not move them."""
FIRST_STEP = "sama_first_step"
"""Key of the ids of the parameters whose momentum buffer this step creates (kept only where dampening is not 0)."""

ETAS = "sama_etas"
"""Key of the step sizes that ASGD keeps per parameter and replaces at the end of the step, by the parameter's id."""


def watch(optimizer_type: type[Optimizer]) -> None:
    """Record the steps of optimizers of exactly this type."""
    _types.add(optimizer_type)


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """One dict per parameter group: those of the last step, or today's if no step was seen since the import."""
    recorded = _records.get(optimizer, [])
    groups = optimizer.param_groups
    return recorded + [_hyperparameters(group) for group in groups[len(recorded) :]]


def steps_made(optimizer: Optimizer) -> int:
    """How many steps this optimizer has made since the import."""
    return _counts.get(optimizer, 0)


def _record(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _counts[optimizer] = _counts.get(optimizer, 0) + 1
    if type(optimizer) in _types:
        _records[optimizer] = [_snapshot(optimizer, group) for group in optimizer.param_groups]


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    copy = {key: value for key, value in group.items() if key != "params"}
    if isinstance(copy["lr"], Tensor):  # schedulers fill it in place
        copy["lr"] = copy["lr"].detach().clone()
    return copy


def _snapshot(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    copy = _hyperparameters(group)
    copy[SKIPPED] = {id(p) for p in group["params"] if p.grad is None}
    if copy.get("dampening"):
        state = optimizer.state
        copy[FIRST_STEP] = {id(p) for p in group["params"] if state.get(p, {}).get("momentum_buffer") is None}
    if "lambd" in copy:
        held = [(id(p), optimizer.state[p]["eta"]) for p in group["params"] if "eta" in optimizer.state.get(p, {})]
        ids, etas = zip(*held, strict=True) if held else ((), ())
        copy[ETAS] = dict(zip(ids, torch._foreach_mul(etas, 1.0) if etas else (), strict=True))  # one kernel for all
    return copy


register_optimizer_step_pre_hook(_record)
