"""What an optimizer's last step was made with: hyperparameters, gradients, and whether it was made at all.

A scheduler may change lr (OneCycleLR: also betas and momentum) between the step and the meta gradient, and another
backward may change `.grad`, but D belongs to the step. Global step hooks of torch.optim, installed when sama_kernels
is imported, copy the group's hyperparameters for the optimizer types that have an adaptation, and note which
parameters sat the step out and which tensors stood in `.grad`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

_records: WeakKeyDictionary[Optimizer, list[dict[str, Any]]] = WeakKeyDictionary()
_counts: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
_rounding_bases: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
_found_infs: WeakKeyDictionary[Optimizer, Tensor | None] = WeakKeyDictionary()  # an entry: a step was seen
_versions: WeakKeyDictionary[Optimizer, dict[int, int]] = WeakKeyDictionary()  # of the parameters after the last step
_types: set[type[Optimizer] | str] = set()

PARAMS = "sama_params"
"""Key of the ids of the parameters that the group had at this step."""
SKIPPED = "sama_skipped"
"""Key of the ids of the parameters that had no gradient at this step, so that it did not move them."""
FIRST_STEP = "sama_first_step"
"""Key of the ids of the parameters whose momentum buffer this step creates (kept only where dampening is not 0)."""
GRADS = "sama_grads"
"""Key of what stood in `.grad` after the step: the parameter's id -> (weak reference to the tensor, its version)."""
ETAS = "sama_etas"
"""Key of the step sizes that ASGD keeps per parameter and replaces at the end of the step, by the parameter's id."""
_OWN_HOOK = "sama_record"
"""Key among an optimizer's own hooks: the last before a step, and the first after it."""
NOTES = (PARAMS, SKIPPED, FIRST_STEP, GRADS, ETAS)
"""The keys of a record that are no hyperparameters."""


def watch(optimizer_type: type[Optimizer] | str) -> None:
    """Record the steps of optimizers of exactly this type, which may be given by `name`."""
    _types.add(optimizer_type)


def name(optimizer_type: type[Optimizer]) -> str:
    """The module and the name of a type."""
    return f"{optimizer_type.__module__}.{optimizer_type.__qualname__}"


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """One dict per parameter group: those of the last step, or today's if no step was seen since the import.

    Groups may have been added or removed since: parameters that are new have sat the step out.
    Raises:
        ValueError: a group has parameters of several groups of the step.
    """
    records, groups = _records.get(optimizer), optimizer.param_groups
    if records is None:
        return [_hyperparameters(group) for group in groups]
    ids = [{id(p) for p in group["params"]} for group in groups]
    if all(ids) and ids == [record[PARAMS] for record in records]:
        return [*records]
    owner = {i: record for record in records for i in record[PARAMS]}
    return [_record_of(group, own, owner) for group, own in zip(groups, ids, strict=True)]


def _record_of(group: dict[str, Any], ids: set[int], owner: dict[int, dict[str, Any]]) -> dict[str, Any]:
    found = {id(owner[i]): owner[i] for i in ids if i in owner}
    if len(found) > 1:
        raise ValueError(
            "optimizer: a parameter group has parameters from several groups of its last step; make a base step"
            " (loss.backward(); optimizer.step()) before the meta step"
        )
    new = ids - owner.keys()
    record = next(iter(found.values())) if found else {**_hyperparameters(group), SKIPPED: set(), GRADS: {}}
    return {**record, SKIPPED: record.get(SKIPPED, set()) | new} if new else record


def is_recorded(optimizer: Optimizer) -> bool:
    """Whether `hyperparameters` are those of a step."""
    return optimizer in _records


def steps_made(optimizer: Optimizer) -> int:
    """How many steps this optimizer has made: since the import, or in all if `restore` said how many there were."""
    return _counts.get(optimizer, 0)


def rounding_base(optimizer: Optimizer) -> int:
    """The number that the seeds of its stochastic roundings start from: `torch.initial_seed()` when first asked; 0 if
    there are several processes, which seed themselves differently, but must move theta alike."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return _rounding_bases.setdefault(optimizer, 0 if several else torch.initial_seed())


def step_seen(optimizer: Optimizer) -> bool:
    """Whether it has made a step in this process, since the import."""
    return optimizer in _found_infs


def found_inf(optimizer: Optimizer) -> Tensor | None:
    """Not 0 if a GradScaler made the last step of a fused optimizer idle; None if the step was an ordinary one."""
    return _found_infs.get(optimizer)


def unchanged(hyper: dict[str, Any], p: Tensor) -> bool:
    """Whether `.grad` still is what it was after the step of `hyper` (also if that step was not seen)."""
    if GRADS not in hyper:
        return True
    seen, grad = hyper[GRADS].get(id(p)), p.grad
    if seen is None or grad is None:
        return seen is grad
    reference, version = seen
    return reference() is grad and grad._version == version


def all_unchanged(hyper: dict[str, Any], params: Iterable[Tensor], grads: Iterable[Tensor | None]) -> bool:
    """Whether all of `params`, of which `grads` are the `.grad`, had one after the step of `hyper`, and it still is
    what it was; also if that step was not seen."""
    if GRADS not in hyper:
        return all(grad is not None for grad in grads)
    seen = hyper[GRADS]
    for p, grad in zip(params, grads, strict=True):
        reference, version = seen.get(id(p), _none)
        if grad is None or reference() is not grad or grad._version != version:
            return False
    return True


def has_moved(optimizer: Optimizer, params: Iterable[Tensor]) -> bool:
    """Whether some of these parameters were written since the step; False if that is not known."""
    versions = _versions.get(optimizer, {})
    return any(versions.get(id(p), p._version) != p._version for p in params)


def restore(optimizer: Optimizer, steps: int, base: int, groups: list[dict[str, Any]]) -> None:
    """Go on from a checkpoint (`sama_kernels.load_state_dict`); `groups` may be empty: no step was seen."""
    _counts[optimizer], _rounding_bases[optimizer] = steps, base
    for kept in (_found_infs, _records, _versions):
        kept.pop(optimizer, None)
    if groups:
        _records[optimizer] = groups


def advanced(optimizer: Optimizer, steps: int) -> None:
    """Note steps that were made without this optimizer's `step`: the gradient of the last is not in `.grad`."""
    _counts[optimizer] = _counts.get(optimizer, 0) + steps
    if _is_watched(optimizer):
        _record(optimizer, (), {})
        for group, record in zip(optimizer.param_groups, _records[optimizer], strict=True):
            record[SKIPPED] = set()
            record[GRADS] = {id(p): _none for p in group["params"]}


def has_hooks(optimizer: Optimizer) -> bool:
    """Whether step hooks were registered on it by others."""
    hooks: Any = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    return any(key != _OWN_HOOK for own in hooks for key in own)


def _nothing() -> None:
    """Like a reference to a tensor that is gone."""


_none = (_nothing, -1)


def _is_watched(optimizer: Optimizer) -> bool:
    return type(optimizer) in _types or name(type(optimizer)) in _types


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _counts[optimizer] = _counts.get(optimizer, 0) + 1
    if _is_watched(optimizer):
        _record(optimizer, args, kwargs)
        # The optimizer's own hooks run after the global ones before a step, and may change lr and .grad: the record is
        # made again after the last. Those after a step run before the global ones, and may clear .grad.
        before: Any = optimizer._optimizer_step_pre_hooks
        after: Any = optimizer._optimizer_step_post_hooks
        if before:
            before[_OWN_HOOK] = _record_again
            before.move_to_end(_OWN_HOOK)
        if after:
            after[_OWN_HOOK] = _note_gradients_first
            after.move_to_end(_OWN_HOOK, last=False)


def _record(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _records[optimizer] = [_snapshot(optimizer, group) for group in optimizer.param_groups]


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    found = getattr(optimizer, "found_inf", None)  # a GradScaler lends it to fused optimizers for the step
    _found_infs[optimizer] = found if isinstance(found, Tensor) else None
    own: Any = optimizer._optimizer_step_post_hooks
    if _OWN_HOOK not in own:
        _note_gradients(optimizer, args, kwargs)


def _note_gradients(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    _versions[optimizer] = {id(p): p._version for group in optimizer.param_groups for p in group["params"]}
    for group, record in zip(optimizer.param_groups, _records.get(optimizer, ()), strict=False):
        record[GRADS] = _gradients(group["params"])
        if closure is not None:  # it made the gradients inside the step
            record[SKIPPED] = {id(p) for p in group["params"] if p.grad is None}


def _gradients(params: Iterable[Tensor]) -> dict[int, tuple[ref[Tensor], int]]:
    return {id(p): (ref(g), g._version) for p in params if (g := p.grad) is not None}


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    copy = {key: value for key, value in group.items() if key != "params"}
    for key, value in copy.items():
        if isinstance(value, Tensor):  # schedulers fill lr in place
            copy[key] = value.detach().clone()
    return copy


def _snapshot(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    copy = _hyperparameters(group)
    copy[PARAMS] = {id(p) for p in group["params"]}
    copy[SKIPPED] = {id(p) for p in group["params"] if p.grad is None}
    if copy.get("dampening"):
        state = optimizer.state
        copy[FIRST_STEP] = {id(p) for p in group["params"] if state.get(p, {}).get("momentum_buffer") is None}
    if "lambd" in copy:
        held = [(id(p), optimizer.state[p]["eta"]) for p in group["params"] if "eta" in optimizer.state.get(p, {})]
        ids, etas = zip(*held, strict=True) if held else ((), ())
        copy[ETAS] = dict(zip(ids, torch._foreach_mul(etas, 1.0) if etas else (), strict=True))  # one kernel for all
    return copy


_record_again = _disable_dynamo(_record)
_note_gradients_first = _disable_dynamo(_note_gradients)
# Where the step itself is compiled, a trace of the hooks would be guarded by the records of all other optimizers.
register_optimizer_step_pre_hook(_disable_dynamo(_before))
register_optimizer_step_post_hook(_disable_dynamo(_after))
