"""v itself through the public interface, and what autograd makes of clipping followed by an optimizer's step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import sama_kernels as sk

SHAPES = [(3, 4), (), (7,)]


def adapted_through_meta_grad(
    params: Sequence[Tensor], optimizer: Any, d: Sequence[Tensor | None], **options: Any
) -> tuple[list[Tensor], sk.MetaGradient]:
    """v = (du/dg)^T d as `meta_grad` has it: with L_base = <lambda, theta> the meta gradient is -v, whatever alpha."""
    lam = [torch.zeros_like(p).requires_grad_() for p in params]
    out = sk.meta_grad(
        lambda: sum(((x * p).sum() for x, p in zip(lam, params, strict=True)), torch.zeros(())),
        lambda: sum(((x * p).sum() for x, p in zip(d, params, strict=True) if x is not None), torch.zeros(())),
        base_params=params,
        meta_params=lam,
        optimizer=optimizer,
        **{"adaptation": "exact", **options},
    )
    return [-g for g in out.grads], out


def clip_by_norm(grads: Sequence[Tensor], max_norm: float, through_norm: bool) -> list[Tensor]:
    """What clip_grad_norm_ does, differentiable; `through_norm`: also the factor."""
    total = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    coef = (max_norm / (total + 1e-6)).clamp(max=1.0)
    return [g * (coef if through_norm else coef.detach()) for g in grads]


def clipped_steps(
    optimizer_type: Any, options: dict[str, Any], steps: int, clip: Callable[[list[Tensor]], Any], scale: float = 1.0
) -> tuple[list[Tensor], Any, Any, list[Tensor], Any]:
    """An optimizer after `steps` steps with clipped gradients, copies from before the last one, its raw gradients, and
    what `clip` returned at it."""
    params = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in SHAPES]
    optimizer = optimizer_type(params, **options)
    before, raw, returned = None, [], None
    for _ in range(steps):
        before = copy.deepcopy(([p.detach() for p in params], optimizer.state_dict()))
        for p in params:
            p.grad = scale * torch.randn_like(p)
        raw = [p.grad.clone() for p in params if p.grad is not None]
        returned = clip(params)
        optimizer.step()
    return params, optimizer, before, raw, returned


def differentiated_with_clipping(
    optimizer_type: Any,
    options: dict[str, Any],
    before: Any,
    raw: Sequence[Tensor],
    d: Sequence[Tensor],
    clip: Callable[[list[Tensor]], list[Tensor]],
) -> list[Tensor]:
    """(du/dg_raw)^T d by autograd through clip and one step of the optimizer with differentiable=True."""
    g = [x.clone().requires_grad_() for x in raw]
    moved = differentiable_step(optimizer_type, options, before, clip(g))
    return list(torch.autograd.grad(-sum((u * x).sum() for u, x in zip(moved, d, strict=True)), g))


def differentiable_step(
    optimizer_type: Any, options: dict[str, Any], before: Any, grads: Sequence[Tensor]
) -> list[Tensor]:
    """The parameters after one step, as functions of `grads`."""
    start, state = copy.deepcopy(before)
    moved = [p.detach().clone().requires_grad_().clone() for p in start]
    optimizer = optimizer_type(moved, **options, differentiable=True)
    state["param_groups"][0]["differentiable"] = True
    optimizer.load_state_dict(state)
    for p, x in zip(moved, grads, strict=True):
        p.grad = x
    optimizer.step()
    return moved
