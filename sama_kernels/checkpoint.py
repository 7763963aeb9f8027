"""`state_dict`, `load_state_dict`: what the library remembers about an optimizer, for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sama_kernels.adaptation import step_record
from sama_kernels.integrations.optimizers import unwrapped

_BY_PARAMETER = (step_record.SKIPPED, step_record.FIRST_STEP)
_KEYS = ("version", "steps", "rounding_base", "groups")
_VERSION = 1


def state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """What `meta_grad` remembers about `optimizer`, which the optimizer's own state_dict does not hold.

    Save it beside that one, and go on with `load_state_dict`: the stochastic roundings are then the same bits as
    without the interruption, and D is taken at the hyperparameters of the last step even where a scheduler has changed
    them since. `.grad` is not part of it: make a base step before the first meta step, as ever.

    Returns: numbers, strings, lists and dicts, for torch.save or json; small (no tensors). Keys: "version" of this
        format; "steps" made; "rounding_base", which together with the steps gives the seed of a meta step; "groups":
        per parameter group the hyperparameters of the last step, empty if none was seen.
    Reads learning rates that are tensors, which waits for the device.
    """
    optimizer = _checked(optimizer)
    groups = []
    if step_record.is_recorded(optimizer):
        records = step_record.hyperparameters(optimizer)
        groups = [_packed(r, g["params"]) for r, g in zip(records, optimizer.param_groups, strict=True)]
    return {
        "version": _VERSION,
        "steps": step_record.steps_made(optimizer),
        "rounding_base": step_record.rounding_base(optimizer),
        "groups": groups,
    }


def load_state_dict(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Go on from what `state_dict` returned, for an optimizer built like the one it came from.

    The optimizer's own `load_state_dict` is called as well, before or after this one.

    Raises:
        TypeError, ValueError: `state` is not from `state_dict`, or from an optimizer with other parameter groups;
            nothing is changed then.
    """
    optimizer = _checked(optimizer)
    if not isinstance(state, Mapping) or any(key not in state for key in _KEYS):
        raise ValueError(f"state: expected what sama_kernels.state_dict returns, a dict with {', '.join(_KEYS)}")
    if state["version"] != _VERSION:
        raise ValueError(f"state: its version is {state['version']}, and this release reads version {_VERSION}")
    groups = state["groups"]
    if groups:
        expected, found = [len(g["params"]) for g in optimizer.param_groups], [g["size"] for g in groups]
        if expected != found:
            raise ValueError(
                f"state: it is of an optimizer with parameter groups of {found} tensors, and this one's have {expected}"
            )
    records = [_unpacked(g, group) for g, group in zip(groups, optimizer.param_groups, strict=False)]
    step_record.restore(optimizer, int(state["steps"]), int(state["rounding_base"]), records)


def _checked(optimizer: Any) -> Optimizer:
    optimizer = unwrapped(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}; a wrapper must be opened"
            " (e.g. .optimizer)"
        )
    return optimizer


def _packed(record: Mapping[str, Any], params: list[Tensor]) -> dict[str, Any]:
    """A step's record without tensors: parameters become their positions in the group."""
    positions = {
        key: [i for i, p in enumerate(params) if id(p) in record[key]] for key in _BY_PARAMETER if key in record
    }
    plain = {key: _plain(value) for key, value in record.items() if key not in (*_BY_PARAMETER, step_record.GRADS)}
    return {"size": len(params), "hyperparameters": {k: v for k, v in plain.items() if v is not ...}, **positions}


def _unpacked(saved: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a step; hyperparameters that JSON cannot hold are taken from the group as it is today."""
    params = group["params"]
    positions = {key: {id(params[i]) for i in saved[key]} for key in _BY_PARAMETER if key in saved}
    today = {key: value for key, value in group.items() if key != "params"}
    return {**today, **saved["hyperparameters"], step_record.PARAMS: {id(p) for p in params}, **positions}


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it; `...` if it cannot (it is then no hyperparameter of torch's, but somebody's own)."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return ... if ... in items else items
    return value if value is None or isinstance(value, bool | int | float | str) else ...
