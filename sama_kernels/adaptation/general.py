"""The general path: v = (du/dg)^T d by autograd through u(g), one parameter at a time, also where D is not diagonal.

The optimizer's state is the one after the step, so an update function says what the step did to it with `carried`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sama_kernels import ops
from sama_kernels.adaptation import step_record
from sama_kernels.adaptation.plan import Family, GroupStep, OpCall
from sama_kernels.backends.reference import compute_dtype
from sama_kernels.distributed.sharded import is_sharded

Update = Callable[[Tensor, Tensor, dict[str, Any], dict[str, Any]], Tensor]
"""update(grad, param, state, hyper) -> u; see `sama_kernels.register_adaptation`."""


def carried(after: Tensor, term: Tensor) -> Tensor:
    """A state tensor of which the step's gradient is one term, for the update functions of `register_adaptation`.

    Its value is `after`, its derivative that of `term`. An optimizer that keeps m <- beta m + (1 - beta) g has
    ``m = carried(state["m"], (1 - beta) * grad)``: the old m, which does not depend on g, need not be known.

    Arguments:
        after: what the step left in the state.
        term: the summand that it added, a function of `grad`; shaped like `after`.
    """
    if after.shape != term.shape:
        raise ValueError(f"carried: after has shape {tuple(after.shape)}, but term has shape {tuple(term.shape)}")
    return after.detach() + (term - term.detach())


def general(update: Update) -> Family:
    """The family of an optimizer whose update is `update`."""

    def family(step: GroupStep) -> list[OpCall]:
        used = moved(step)
        if any(is_sharded(step.params[i]) for i in used):
            raise TypeError(
                f"optimizer: the adaptation of {step_record.name(type(step.optimizer))} may mix the elements of a"
                f" parameter, of which this rank has a part only ({step.name} holds DTensors); use an element-wise"
                ' optimizer such as AdamW, or pass adaptation="none"'
            )
        lists: tuple[list[Any], ...] = (
            [step.gradient(i) for i in used],
            [step.params[i] for i in used],
            [step.optimizer.state.get(step.params[i], {}) for i in used],
        )
        hyper = {key: value for key, value in step.hyper.items() if key not in step_record.NOTES}
        options = {"update": update, "hyper": hyper, "mode": step.mode, "name": step_record.name(type(step.optimizer))}
        return [OpCall(vector_jacobian, [step.rows[i] for i in used], lists, options)] if used else []

    return family


def moved(step: GroupStep) -> list[int]:
    """Which parameters the step has moved: all, as those without a gradient were left out (`step_record.SKIPPED`); if
    nobody saw the step (the state comes from a checkpoint, the type was registered later) those that have a state."""
    seen = step_record.SKIPPED in step.hyper
    return [i for i, p in enumerate(step.params) if seen or step.optimizer.state.get(p)]


def vector_jacobian(
    v: Sequence[Tensor],
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    *,
    update: Update,
    hyper: dict[str, Any],
    mode: int,
    name: str,
    backend: str,
) -> Tensor:
    """v <- (du/dg)^T d, in plain PyTorch whatever the backend; memory beyond v: the graph of one parameter.

    Under `ops.PAPER` cells with g = 0 and u = 0, which the step did not see, get 0.

    Arguments:
        v: the direct gradients d, overwritten.
        grads, params, states: of the step; the last two as it left them. Shaped like v, only read.
    Returns:
        ||v||^2 over the list, float64, 0-dim, on v's device, of the values before they are rounded to v's dtype.
    """
    norm_sq = torch.zeros((), dtype=torch.float64, device=v[0].device)
    for d, grad, param, state in zip(v, grads, params, states, strict=True):
        adapted = _adapted(d, grad, param, state, update, hyper, mode, name)
        norm_sq += torch.linalg.vector_norm(adapted, dtype=torch.float64).square()
        d.copy_(adapted)
        del adapted  # before the next graph
    return norm_sq


def _adapted(
    d: Tensor,
    grad: Tensor,
    param: Tensor,
    state: dict[str, Any],
    update: Update,
    hyper: dict[str, Any],
    mode: int,
    name: str,
) -> Tensor:
    own = {"param": param, **{f"state[{key!r}]": x for key, x in state.items() if isinstance(x, Tensor)}}
    versions = {key: _version(x) for key, x in own.items()}
    with torch.enable_grad():
        g = grad.detach().to(compute_dtype(d.dtype)).requires_grad_()
        views = {key: _view(x) if isinstance(x, Tensor) else x for key, x in state.items()}
        u: Any = update(g, _view(param), views, hyper)
        changed = [key for key, x in own.items() if _version(x) != versions[key]]
        if changed:
            raise RuntimeError(f"update of {name}: it changed {changed[0]} in place; it must only read its arguments")
        _check_update(u, g, name)
        (adapted,) = torch.autograd.grad(u, g, d.to(u.dtype), allow_unused=True)
    if adapted is None:
        raise ValueError(_DETACHED.format(name))
    if mode == ops.PAPER:
        adapted = torch.where((g == 0) & (u == 0), 0.0, adapted)
    return adapted.detach()


_DETACHED = (
    "update of {}: its result has no gradient with respect to grad: it does not use it, or it was detached or computed"
    " under no_grad"
)


def _check_update(u: Any, g: Tensor, name: str) -> None:
    if not isinstance(u, Tensor):
        raise TypeError(f"update of {name}: it must return a tensor, the u of theta - u, got {type(u).__name__}")
    if u.shape != g.shape or not u.is_floating_point():
        raise ValueError(
            f"update of {name}: it must return u shaped like grad, {tuple(g.shape)}, and real; got"
            f" {tuple(u.shape)}, {u.dtype}"
        )
    if not u.requires_grad:
        raise ValueError(_DETACHED.format(name))


def _view(x: Tensor) -> Tensor:
    """`x` without its graph; 16-bit numbers widened, as sums in their own dtype would lose most digits."""
    x = x.detach()
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def scalar(x: Any, like: Tensor) -> Tensor:
    """A hyperparameter or a step counter as a 0-dim float64 tensor on the device of `like`, without waiting for it."""
    if isinstance(x, Tensor) and x.device.type != "cpu":
        return x.double()
    return torch.full((), float(x), dtype=torch.float64, device=like.device)
