"""A step of Adam or AdamW with its derivative in closed form: 3 n kept per step, where autograd through torch's own
differentiable step keeps more than 5 n and makes some ten passes more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

State = list[dict[str, Any]]

PIECE = 1 << 22
"""Elements whose adjoints are made at a time."""


@dataclass(frozen=True)
class Hyperparameters:
    """Those of the t-th step of some parameters; `decoupled` is AdamW's weight decay."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    sign: float
    t: int

    @property
    def step_size(self) -> float:
        return self.lr / (1 - self.beta1**self.t)

    @property
    def root_correction(self) -> float:
        return float((1 - self.beta2**self.t) ** 0.5)


def fits(optimizer: Optimizer, state: State) -> bool:
    """Whether `step` can make this optimizer's step: Adam or AdamW by exact type, without amsgrad, lr, betas and step
    counts known to the host."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return False
    known = all(
        not group["amsgrad"] and all(isinstance(x, float | int) for x in (group["lr"], *group["betas"]))
        for group in optimizer.param_groups
    )
    return known and all(s["step"].device.type == "cpu" for s in state if s)


def step(
    optimizer: Optimizer,
    params: Sequence[Tensor],
    theta: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    state: State,
) -> tuple[list[Tensor], State]:
    """theta and the state after a step of `optimizer`, which holds `params` in the places of `theta`; differentiable
    in theta, gradients and state. Without a gradient a parameter is not moved, as in torch."""
    moved, after = list(theta), [dict(s) for s in state]
    for hyper, rows in _alike(optimizer, params, grads, state).items():
        inputs = [theta[row] for row in rows]
        for key in ("exp_avg", "exp_avg_sq"):
            inputs += [state[row][key] if state[row] else torch.zeros_like(theta[row]) for row in rows]
        out = _AdamStep.apply(hyper, *[grads[row] for row in rows], *inputs)  # type: ignore[no-untyped-call]
        n = len(rows)
        for k, row in enumerate(rows):
            moved[row] = out[k]
            count = torch.tensor(float(hyper.t), dtype=torch.float64, device="cpu")
            after[row] = {"step": count, "exp_avg": out[n + k], "exp_avg_sq": out[2 * n + k]}
    return moved, after


def _alike(
    optimizer: Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor | None], state: State
) -> dict[Hyperparameters, list[int]]:
    """The rows that make the same step."""
    row_of = {id(p): row for row, p in enumerate(params)}
    found: dict[Hyperparameters, list[int]] = {}
    for group in optimizer.param_groups:
        for row in (row_of[id(p)] for p in group["params"] if id(p) in row_of):
            if grads[row] is not None:
                hyper = Hyperparameters(
                    lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
                    weight_decay=group["weight_decay"], sign=-1.0 if group["maximize"] else 1.0,
                    decoupled=group.get("decoupled_weight_decay", type(optimizer) is torch.optim.AdamW),
                    t=(int(state[row]["step"]) if state[row] else 0) + 1,
                )  # fmt: skip
                found.setdefault(hyper, []).append(row)
    return found


class _AdamStep(torch.autograd.Function):
    """(g, theta, m, s) of n parameters each -> (theta', m', s'); s is the second moment."""

    @staticmethod
    def forward(ctx: Any, hyper: Hyperparameters, *tensors: Tensor) -> tuple[Tensor, ...]:
        n = len(tensors) // 4
        g, theta, m, s = (list(tensors[k * n : (k + 1) * n]) for k in range(4))
        seen = _seen(hyper, g, theta)
        m = list(torch._foreach_lerp(m, seen, 1 - hyper.beta1))
        s = list(torch._foreach_mul(s, hyper.beta2))
        torch._foreach_addcmul_(s, seen, seen, 1 - hyper.beta2)
        decay = 1 - hyper.lr * hyper.weight_decay if hyper.decoupled else 1.0
        moved = torch._foreach_mul(theta, decay)
        for rows in _pieces(m):
            denominator = _root(hyper, s[rows])
            torch._foreach_add_(denominator, hyper.eps)
            torch._foreach_addcdiv_(moved[rows], m[rows], denominator, -hyper.step_size)
        ctx.hyper, ctx.n, ctx.decay = hyper, n, decay
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*g, *(theta if _l2(hyper) else ()), *m, *s)
        return (*moved, *m, *s)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *adjoint: Tensor | None) -> tuple[Tensor | None, ...]:
        hyper, n, saved = ctx.hyper, ctx.n, ctx.saved_tensors
        g, theta, m, s = saved[:n], saved[n : 2 * n], saved[-2 * n : -n], saved[-n:]
        wanted = [any(ctx.needs_input_grad[1 + k * n : 1 + (k + 1) * n]) for k in range(4)]
        found: list[list[Tensor | None]] = [[], [], [], []]
        for rows in _pieces(m):
            of_moved, of_m, of_s = (list(adjoint[k * n : (k + 1) * n][rows]) for k in range(3))
            seen = _seen(hyper, list(g[rows]), list(theta[rows]) if _l2(hyper) else [])
            part = _back(hyper, ctx.decay, wanted, seen, list(m[rows]), list(s[rows]), of_moved, of_m, of_s)
            for all_of, those in zip(found, part, strict=True):
                all_of += those if those is not None else [None] * len(of_m)
        return None, *found[0], *found[1], *found[2], *found[3]


def _pieces(tensors: Sequence[Tensor]) -> list[slice]:
    """Of about PIECE elements, or one tensor: what is made on the way is then small beside the model."""
    pieces, begin, size = [], 0, 0
    for row, x in enumerate(tensors):
        size += x.numel()
        if size >= PIECE or row == len(tensors) - 1:
            pieces.append(slice(begin, row + 1))
            begin, size = row + 1, 0
    return pieces


def _back(
    hyper: Hyperparameters, decay: float, wanted: Sequence[bool], seen: list[Tensor], m: list[Tensor], s: list[Tensor],
    adjoint: list[Tensor | None], adjoint_m: list[Tensor | None], adjoint_s: list[Tensor | None],
) -> tuple[list[Tensor] | None, ...]:  # fmt: skip
    """The adjoints of g, theta, m and s (those that are `wanted`) from those of theta', m' and s'."""
    a = [torch.zeros_like(y) if x is None else x for x, y in zip(adjoint, m, strict=True)]
    root = _root(hyper, s)
    denominator = torch._foreach_add(root, hyper.eps)
    # theta' = ... - size m' / (r + eps) with r = sqrt(s') / c: of m' it gets -size a / (r + eps) =: x, of s'
    # -x m' / (r + eps) / (2 r c^2), which is 0 where no gradient has been: there sqrt has no derivative.
    of_m = list(torch._foreach_div(a, denominator))
    torch._foreach_mul_(of_m, -hyper.step_size)
    of_s = list(torch._foreach_mul(of_m, m))
    torch._foreach_mul_(denominator, root)
    torch._foreach_mul_(denominator, -2 * hyper.root_correction**2)
    torch._foreach_div_(of_s, denominator)
    for x, r in zip(of_s, root, strict=True):
        x.masked_fill_(r == 0, 0.0)
    for sums, more in ((of_m, adjoint_m), (of_s, adjoint_s)):
        for x, y in zip(sums, more, strict=True):
            if y is not None:
                x.add_(y)
    of_theta = None
    if wanted[1]:
        of_theta = a if decay == 1 and not _l2(hyper) else list(torch._foreach_mul(a, decay))
    of_g = list(torch._foreach_mul(of_m, 1 - hyper.beta1))
    torch._foreach_addcmul_(of_g, of_s, seen, 2 * (1 - hyper.beta2))
    if of_theta is not None and _l2(hyper):
        torch._foreach_add_(of_theta, of_g, alpha=hyper.weight_decay)
    if hyper.sign < 0:
        torch._foreach_neg_(of_g)
    for sums, beta, k in ((of_m, hyper.beta1, 2), (of_s, hyper.beta2, 3)):
        if wanted[k]:
            torch._foreach_mul_(sums, beta)
    return of_g, of_theta, of_m if wanted[2] else None, of_s if wanted[3] else None


def _l2(hyper: Hyperparameters) -> bool:
    return hyper.weight_decay != 0 and not hyper.decoupled


def _seen(hyper: Hyperparameters, g: list[Tensor], theta: list[Tensor]) -> list[Tensor]:
    """The gradient that the moments see: of -L if it is to be maximized, with L2 decay."""
    seen = g if hyper.sign > 0 else list(torch._foreach_neg(g))
    return list(torch._foreach_add(seen, theta, alpha=hyper.weight_decay)) if _l2(hyper) else seen


def _root(hyper: Hyperparameters, s: list[Tensor]) -> list[Tensor]:
    """r = sqrt(s') / sqrt(1 - beta2^t); the step divides by r + eps."""
    root = list(torch._foreach_sqrt(s))
    torch._foreach_div_(root, hyper.root_correction)
    return root
