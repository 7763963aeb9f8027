"""A meta step of an algorithm with second derivatives: the same guards, the same result as SAMA's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from sama_kernels import scaling
from sama_kernels.algorithms.hessian import BaseGradient, Vector, dot
from sama_kernels.algorithms.implicit import solve
from sama_kernels.algorithms.options import Algorithm, Iterative
from sama_kernels.algorithms.unrolled import Unroll, Unrolled
from sama_kernels.buffers import BufferGuard
from sama_kernels.direction import adaptation_of
from sama_kernels.distributed import Adapt, Alone, quiet, ranks_of
from sama_kernels.distributed.sharded import is_sharded
from sama_kernels.guards import Interrupts, RngState
from sama_kernels.hooks import Hooks, gradient_hooks, unhooked
from sama_kernels.jvp import uncompiled
from sama_kernels.ownership import own
from sama_kernels.passes import buffer_guard, direct_gradient
from sama_kernels.types import Clipping, MetaGradient, Problem


def second_order(problem: Problem, algorithm: Algorithm) -> MetaGradient:
    """The meta gradient by `algorithm`, which is not SAMA.

    `norm` is that of w (of the meta gradient, for Iterative), `epsilon` is 0, and both base losses are that at theta.
    With several processes the meta gradients are averaged after the passes.
    """
    _check(problem, algorithm)
    hooks = [gradient_hooks(p) for p in problem.base_params]
    with Interrupts() as interrupts, torch.no_grad():
        with (
            RngState(problem.generators) as rng,
            buffer_guard(problem) as buffers,
            ranks_of(problem) as ranks,
            quiet(problem.reached),
            unhooked(problem.meta_params),
            unhooked(problem.base_params),  # they belong to the base gradient, and are applied to it
            uncompiled(),
        ):
            if isinstance(algorithm, Iterative):
                unroll = Unroll(problem, algorithm, hooks, rng, buffers, interrupts)
                result = _result(problem, ranks, _iterative(problem, unroll.run()), of_meta_loss=True)
            else:
                result = _result(problem, ranks, _implicit(problem, algorithm, hooks, ranks, rng, buffers, interrupts))
        if isinstance(algorithm, Iterative) and algorithm.advance:
            unroll.advance()
    return result


class Found(NamedTuple):
    """What an algorithm found: -(its part of the meta gradient), the explicit part, losses, and the norm of w."""

    mixed: Vector
    explicit: Sequence[Tensor | None]
    meta_loss: Tensor
    base_loss: Tensor
    norm: Tensor


def _iterative(problem: Problem, out: Unrolled) -> Found:
    grads = [torch.zeros_like(p) if x is None else -x for p, x in zip(problem.meta_params, out.grads, strict=True)]
    return Found(grads, [None] * len(grads), out.loss, out.base_loss, dot(grads, grads).sqrt())


def _implicit(
    problem: Problem, algorithm: Algorithm, hooks: Hooks,
    ranks: Alone, rng: RngState, buffers: BufferGuard, interrupts: Interrupts,
) -> Found:  # fmt: skip
    meta = direct_gradient(problem, ranks, interrupts)
    d = [
        torch.zeros_like(p, memory_format=torch.contiguous_format) if x is None else x.contiguous()
        for p, x in zip(problem.base_params, own(meta.d, problem.base_params, set()), strict=True)
    ]
    meta.d.clear()
    rng.follow()
    rng.restore()
    buffers.restore()
    g = BaseGradient(problem.base_losses, problem.base_params, problem.meta_params, hooks, interrupts)
    adaptation = cache(lambda: adaptation_of(problem))  # not all of them ask for it, or have an optimizer
    w = solve(algorithm, g, d, lambda x: _adapted(adaptation(), x, problem.clipping.coef))
    return Found(g.mixed_product(w), meta.explicit, meta.loss, g.loss, dot(w, w).sqrt())


def _check(problem: Problem, algorithm: Algorithm) -> None:
    name = type(algorithm).__name__
    if problem.update_base:
        raise ValueError(f"update_base: it is a part of SAMA; {name} does not move theta")
    if problem.loss_scale is not None:
        raise NotImplementedError(f"grad_scaler: {name} takes losses as they are; use autocast to bfloat16, or SAMA")
    if problem.synchronisation is not None and problem.synchronisation.sync == "full":
        raise NotImplementedError(f'sync: "full" is for SAMA; with {name} use "final": meta gradients are averaged')
    if problem.synchronisation is not None and isinstance(algorithm, Iterative) and algorithm.advance:
        raise NotImplementedError(
            "algorithm: Iterative(advance=True) would lead every process elsewhere; make the base"
            " steps with averaged gradients, and leave advance out"
        )
    if isinstance(algorithm, Iterative):
        _check_iterative(problem, algorithm)
    if any(is_sharded(p) for p in (*problem.base_params, *problem.meta_params)):
        raise NotImplementedError(f"base_params, meta_params: {name} does not take sharded parameters; use SAMA")


def _check_iterative(problem: Problem, algorithm: Iterative) -> None:
    if problem.optimizer is None:
        raise ValueError("optimizer: Iterative makes steps of the base optimizer; pass it")
    if problem.clipping != Clipping():
        raise NotImplementedError(
            "clip_coef, clip_value: the steps of Iterative are not clipped; leave it out where no step is clipped, or"
            " use SAMA"
        )
    if problem.master_params is not None:
        raise NotImplementedError("master_params: Iterative steps base_params themselves; use SAMA")
    if algorithm.advance:
        own = {*map(id, problem.base_params)}
        others = [
            p for g in problem.optimizer.param_groups for p in g["params"] if p.requires_grad and id(p) not in own
        ]
        if others:
            raise ValueError(
                "base_params: Iterative(advance=True) makes the base steps, but the optimizer trains"
                f" {len(others)} parameters that are not among them; pass all of them"
            )


def _adapted(adapt: Adapt, w: Vector, coef: Tensor | None) -> Vector:
    """(du/dg)^T w, in new memory; 0 where the optimizer has not moved theta. Without `coef`, the factor of clipping, in
    float64, it is what SAMA stores, whose step length accounts for that factor (`scaling`)."""
    v: list[Tensor | None] = [x.clone() for x in w]
    adapt(v)
    if coef is not None:
        for y in v:
            if y is not None:
                y.copy_(y * coef)
    return [torch.zeros_like(x) if y is None else y for x, y in zip(w, v, strict=True)]


def _result(problem: Problem, ranks: Alone, found: Found, of_meta_loss: bool = False) -> MetaGradient:
    """-mixed + explicit, averaged over the ranks; `of_meta_loss`: -mixed is all of the meta loss's derivative, and
    counts for what that does."""
    mixed, explicit, meta_loss, base_loss, norm = found
    kept = norm.isfinite()  # otherwise the result is zeros
    if problem.skipped is not False:
        skipped = torch.as_tensor(problem.skipped, device=norm.device) != 0
        kept, norm = kept & ~skipped, torch.where(skipped, 0.0, norm)
    degenerate = ~(kept & (norm > 0))

    def form(rows: Sequence[int], first: list[Tensor | None], last: Sequence[Tensor | None]) -> list[Tensor]:
        formed = []
        for row, x in zip(rows, first, strict=True):
            assert x is not None
            base_share, meta_share = ranks.shares_of(row)
            x.copy_(torch.where(degenerate, 0.0, -x * (meta_share if of_meta_loss else base_share)))
            for term in scaling.explicit_terms(problem, [explicit[row]], meta_share):
                x += torch.where(kept, term, 0.0)
            formed.append(x)
        return formed

    ranks.begin_last_pass(mixed, form)
    grads = ranks.meta_gradient([None] * len(mixed))
    losses = (meta_loss, base_loss, base_loss)
    verdict = ranks.conclude(losses, degenerate, norm, None)
    if verdict is not None:
        degenerate = verdict.degenerate | verdict.bad
        grads = [torch.where(verdict.bad, 0.0, x) for x in grads]
        meta_loss, base_loss, _ = (x.to(own.dtype) for x, own in zip(verdict.losses, losses, strict=True))
    out = tuple(x.to(p.dtype) for x, p in zip(grads, problem.meta_params, strict=True))
    return MetaGradient(out, meta_loss, base_loss, base_loss, norm, torch.zeros_like(norm), degenerate)
