"""A step of the optimizer itself, differentiated by autograd."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sama_kernels.adaptation import step_record

State = list[dict[str, Any]]
"""The optimizer's state, one dict per base parameter."""

SCALARS = ("step", "mu_product", "eta", "mu")
"""What torch keeps in float32; a differentiable step, unlike others, reckons in their dtype: the bias correction
1 - 0.999^t would have 5 digits."""
_DIFFERENTIABLE = {"differentiable": True, "foreach": False, "fused": False, "capturable": False}


def check(optimizer: Optimizer) -> None:
    """Raise NotImplementedError if the optimizer's step cannot be differentiated, or is not all that it does."""
    kind = type(optimizer).__name__
    if "differentiable" not in optimizer.defaults:
        raise NotImplementedError(
            f"algorithm: Iterative differentiates the optimizer's step, and {kind} has no option `differentiable`; use"
            ' "truncated", or SGD, Adam, AdamW or another optimizer of torch.optim'
        )
    if step_record.has_hooks(optimizer):
        raise NotImplementedError(
            f"algorithm: Iterative makes steps of a copy of the optimizer, and the step hooks of this {kind} know the"
            " optimizer alone; remove them, or use SAMA"
        )


def step(
    optimizer: Optimizer,
    params: Sequence[Tensor],
    theta: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    state: State,
) -> tuple[list[Tensor], State]:
    """theta and the state after a step of a copy of `optimizer`, which holds `params` in the places of `theta`."""
    # It works in place, and what it overwrites is part of the graph.
    moved = [x.clone() for x in theta]
    copy = _copy_of(optimizer, params, moved)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        for x, g, s in zip(moved, grads, state, strict=True):
            x.grad = g
            if s:
                copy.state[x] = {key: _copied(key, v) for key, v in s.items()}
        _start_momentum(copy)
        copy.step()
        for x in moved:
            x.grad = None
    return moved, [dict(copy.state.get(x, {})) for x in moved]


def _copy_of(optimizer: Optimizer, params: Sequence[Tensor], theta: Sequence[Tensor]) -> Any:
    """The same optimizer, with what a class of the user's keeps in it, of other tensors. (Not by `copy.copy`, which
    keeps only what torch knows of; not with `step` itself, where a scheduler has put a wrapper that is bound to the
    original.)"""
    of = {id(p): x for p, x in zip(params, theta, strict=True)}
    groups = [
        {**group, "params": [of[id(p)] for p in group["params"] if id(p) in of], **_DIFFERENTIABLE}
        for group in optimizer.param_groups
    ]
    copy: Any = object.__new__(type(optimizer))
    copy.__dict__.update({key: value for key, value in vars(optimizer).items() if key != "step"})
    copy.defaults = {**optimizer.defaults, **_DIFFERENTIABLE}
    copy.param_groups = [group for group in groups if group["params"]]
    copy.state = defaultdict(dict)
    return copy


def _start_momentum(optimizer: Any) -> None:
    """Give SGD the momentum buffers of before its first step with which the update b <- momentum b + (1 - dampening) g
    makes b = g, as that step does. torch makes the first b by `detach`, and the derivative is lost."""
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        for x in group["params"] if group["momentum"] else ():
            if x.grad is not None and optimizer.state[x].get("momentum_buffer") is None:
                g = (-x.grad if group["maximize"] else x.grad) + group["weight_decay"] * x
                optimizer.state[x]["momentum_buffer"] = group["dampening"] / group["momentum"] * g


def _copied(key: str, x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.to(torch.float64, copy=True) if key in SCALARS else x.clone()
