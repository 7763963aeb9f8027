"""Optimizers after a few steps, what autograd makes of such a step, and what the library makes of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sama_kernels import adaptation

SHAPES = [(3, 4), (), (7,)]


def stepped(
    optimizer_type: type[torch.optim.Optimizer],
    options: dict[str, Any],
    steps: int,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
) -> tuple[Any, Any, Any]:
    """An optimizer after `steps` steps on random gradients, and copies of both before the last one."""
    params = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    optimizer = optimizer_type(params, **options)
    for k in range(steps):
        for p in params:
            p.grad = torch.randn_like(p)
        if k == steps - 1:
            before = copy.deepcopy((params, optimizer.state_dict()))
        optimizer.step()
    return params, optimizer, before


def differentiated(
    optimizer_type: Any, options: dict[str, Any], before: Any, grads: list[Tensor], d: list[Tensor]
) -> list[Tensor]:
    """(du/dg) d by autograd through one step of the optimizer with differentiable=True; for SGD, whose u is linear
    in g, by a difference of two of its steps, as torch detaches the gradient where it creates the momentum buffer."""
    if optimizer_type is torch.optim.SGD:
        at_g, beyond = (
            updated(optimizer_type, options, before, [g + t * x for g, x in zip(grads, d, strict=True)])
            for t in (0.0, 1.0)
        )
        return [a - b for a, b in zip(at_g, beyond, strict=True)]
    params, state = before
    g = [x.clone().requires_grad_() for x in grads]
    inputs = [p.detach().clone().requires_grad_() for p in params]
    moved = [p.clone() for p in inputs]
    optimizer = optimizer_type(moved, **options, differentiable=True)
    state["param_groups"][0]["differentiable"] = True
    optimizer.load_state_dict(state)
    for p, x in zip(moved, g, strict=True):
        p.grad = x
    optimizer.step()
    update = [a - b for a, b in zip(inputs, moved, strict=True)]
    return list(torch.autograd.grad(sum((u * x).sum() for u, x in zip(update, d, strict=True)), g))


def updated(optimizer_type: Any, options: dict[str, Any], before: Any, grads: list[Tensor]) -> list[Tensor]:
    """The parameters after one plain step of the optimizer with these gradients."""
    params, state = copy.deepcopy(before)
    optimizer = optimizer_type(params, **options)
    optimizer.load_state_dict(state)
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()
    return [p.detach() for p in params]


def adapted(
    optimizer: torch.optim.Optimizer, params: list[Tensor], d: list[Tensor], mode: str, backend: str
) -> tuple[list[Tensor], Tensor]:
    v: list[Tensor | None] = [x.clone() for x in d]
    with torch.no_grad():
        norm_sqs = adaptation.apply(adaptation.plan(optimizer, params, mode), v, backend)
    return [x for x in v if x is not None], torch.stack(norm_sqs).sum().sqrt()


def differenced(
    optimizer_type: Any, options: dict[str, Any], before: Any, grads: list[Tensor], d: list[Tensor], h: float = 1e-3
) -> list[Tensor]:
    """(du/dg)^T d, cell by cell, by central differences of fourth order of the optimizer's own step, which must be in
    float64. Nothing is assumed about the step; the parameters of `before` are taken to be updated independently."""
    v = [torch.zeros_like(g) for g in grads]
    for cell in range(max(g.numel() for g in grads)):
        touched = [i for i, g in enumerate(grads) if cell < g.numel()]
        for shift, weight in ((1, 8.0), (-1, -8.0), (2, -1.0), (-2, 1.0)):
            moved = [g.clone() for g in grads]
            for i in touched:
                moved[i].view(-1)[cell] += shift * h
            after = updated(optimizer_type, options, before, moved)
            for i in touched:  # u is what the step subtracts
                v[i].view(-1)[cell] -= weight / (12 * h) * (after[i] * d[i]).sum()
    return v
