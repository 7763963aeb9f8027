"""The hyperparameters with which an optimizer made its last step.

A scheduler may change lr (OneCycleLR: also betas and momentum) between the step and the meta gradient, but D belongs
to the step. A global step pre-hook of torch.optim, installed when sama_kernels is imported, copies the group's
hyperparameters for the optimizer types that have an adaptation, and notes which parameters sat the step out.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_records: WeakKeyDictionary[Optimizer, list[dict[str, Any]]] = WeakKeyDictionary()
_counts: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
_types: set[type[Optimizer] | str] = set()

SKIPPED = "sama_skipped"
"""Key of the ids of the parameters that had no gradient at this step, so that it did not move them."""
FIRST_STEP = "sama_first_step"
"""Key of the ids of the parameters whose momentum buffer this step creates (kept only where dampening is not 0)."""
NOTES = (SKIPPED, FIRST_STEP)
"""The keys of a record that are no hyperparameters."""


def watch(optimizer_type: type[Optimizer] | str) -> None:
    """Record the steps of optimizers of exactly this type, which may be given by `name`."""
    _types.add(optimizer_type)


def name(optimizer_type: type[Optimizer]) -> str:
    """The module and the name of a type."""
    return f"{optimizer_type.__module__}.{optimizer_type.__qualname__}"


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
    if type(optimizer) in _types or name(type(optimizer)) in _types:
        _records[optimizer] = [_snapshot(optimizer, group) for group in optimizer.param_groups]


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    copy = {key: value for key, value in group.items() if key != "params"}
    for key, value in copy.items():
        if isinstance(value, Tensor):  # schedulers fill lr in place
            copy[key] = value.detach().clone()
    return copy


def _snapshot(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    copy = _hyperparameters(group)
    copy[SKIPPED] = {id(p) for p in group["params"] if p.grad is None}
    if copy.get("dampening"):
        state = optimizer.state
        copy[FIRST_STEP] = {id(p) for p in group["params"] if state.get(p, {}).get("momentum_buffer") is None}
    return copy


# Where the step itself is compiled, a trace of the hook would be guarded by the records of all other optimizers.
register_optimizer_step_pre_hook(_disable_dynamo(_record))
