"""dL_base/dlambda differentiated along v, in the three ways that `difference` names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sama_kernels import ops, scaling
from sama_kernels.buffers import BufferGuard
from sama_kernels.distributed import Alone
from sama_kernels.distributed.sharded import like, local
from sama_kernels.guards import Interrupts, RngState
from sama_kernels.jvp import TangentPass, tangents
from sama_kernels.passes import MetaPass, PerturbedPasses
from sama_kernels.perturbation import Perturbation
from sama_kernels.scaling import StepSize
from sama_kernels.types import Problem


@dataclass
class Sides:
    """What the base passes gave, besides the gradients that went to `Alone.begin_last_pass`.

    Attributes:
        loss_plus, loss_minus: L_base on both sides, 0-dim.
        last: dL_base/dlambda of the last pass, one per meta parameter; None where lambda is not read.
        step: what was realised of theta+ - theta (`Perturbation.plus`); None if that was not measured.
        move: brings theta to theta-.
    """

    loss_plus: Tensor
    loss_minus: Tensor
    last: Sequence[Tensor | None]
    step: Tensor | None
    move: Callable[[], object]


@dataclass
class Outcome:
    """Steps 4 and 5 of a meta step.

    Attributes:
        grads: the meta gradient, one per meta parameter, in its dtype.
        losses: L_meta(theta), L_base(theta+), L_base(theta-), 0-dim.
        size: the step size; degenerate where the passes came to nothing.
        step: as in `Sides`.
    """

    grads: tuple[Tensor, ...]
    losses: tuple[Tensor, Tensor, Tensor]
    size: StepSize
    step: Tensor | None


def evaluate(
    problem: Problem,
    theta: Perturbation,
    size: StepSize,
    meta: MetaPass,
    ranks: Alone,
    buffers: BufferGuard,
    rng: RngState,
    interrupts: Interrupts,
) -> Outcome:
    """The base passes of a meta step and their difference quotient; theta is frozen, and at theta or
    (`Perturbation.keep`) theta- afterwards."""
    form = partial(_quotient, problem, size, meta.explicit, ranks)
    if problem.difference == "exact":
        sides = _exact(problem, theta, size, TangentPass(problem, ranks, buffers, rng, interrupts), ranks, form)
    else:
        passes = PerturbedPasses(problem, ranks, buffers, rng, interrupts)
        difference = _forward if problem.difference == "forward" else _central
        sides = difference(problem, theta, size, passes, ranks, form)
    grads = ranks.meta_gradient(sides.last)
    losses = (meta.loss, sides.loss_plus, sides.loss_minus)
    bad = scaling.overflow(problem, grads)
    verdict = ranks.conclude(losses, size.degenerate, size.norm, bad)
    if verdict is not None:
        size = replace(size, degenerate=verdict.degenerate)
        bad = verdict.bad if bad is None else bad | verdict.bad
        meta_loss, plus, minus = (x.to(own.dtype) for x, own in zip(verdict.losses, losses, strict=True))
        losses = (meta_loss, plus, minus)
    if bad is not None:
        size = scaling.without(size, bad)
        grads = [torch.where(bad, 0.0, g) for g in grads]
    if problem.update_base:
        sides.move()
        theta.keep(unless=bad)
    return Outcome(
        tuple(like(g.to(p.dtype), p) for p, g in zip(problem.meta_params, grads, strict=True)), losses, size, sides.step
    )


Form = Callable[[Tensor, Sequence[int], list[Tensor | None], Sequence[Tensor | None]], list[Tensor]]
"""`_quotient`, with its first arguments given."""


def _central(
    problem: Problem, theta: Perturbation, size: StepSize, passes: PerturbedPasses, ranks: Alone, form: Form
) -> Sides:
    """From theta - epsilon v to theta + epsilon v: the error is of second order in epsilon (paper, Eq. 5)."""
    step = theta.plus(size.along, problem.rounding, problem.seed)
    loss_plus, plus = passes.at_plus(theta)
    theta.minus(size.along)
    ranks.begin_last_pass(plus, partial(form, size.quotient))
    loss_minus, minus = passes.at_other_side()
    return Sides(loss_plus, loss_minus, minus, step, move=lambda: None)


def _forward(
    problem: Problem, theta: Perturbation, size: StepSize, passes: PerturbedPasses, ranks: Alone, form: Form
) -> Sides:
    """From theta to theta + epsilon v: first order, but the pass at theta also finds the values to be held."""
    loss, at_theta = passes.at_theta()
    step = theta.plus(size.along, problem.rounding, problem.seed)
    ranks.begin_last_pass(at_theta, partial(form, -size.quotient / 2))
    loss_plus, plus = passes.at_other_side()
    return Sides(loss_plus, loss, plus, step, move=lambda: theta.minus(size.along))


def _exact(problem: Problem, theta: Perturbation, size: StepSize, only: TangentPass, ranks: Alone, form: Form) -> Sides:
    """The derivative along v / ||v|| in forward mode, times ||v||: v itself may be too small for 16-bit tangents."""
    length = size.epsilon * size.norm  # of the step that the other differences make

    def per_length(x: Tensor) -> Tensor:
        return torch.where(size.degenerate, 0.0, x / length)

    if theta.v:
        ops.adapt_norm_scale(theta.v, 1.0, lr=per_length(size.along), backend=problem.backend)
    with tangents(theta.params, theta.v):
        loss, derivative = only.at_theta()
    ranks.begin_last_pass(derivative, partial(form, per_length(size.quotient / 2)))

    def move() -> None:
        theta.plus(torch.where(size.degenerate, 0.0, -length), problem.rounding, problem.seed)

    return Sides(loss, loss, [None] * len(derivative), None, move)


def _quotient(
    problem: Problem,
    size: StepSize,
    explicit: Sequence[Tensor | None],
    ranks: Alone,
    quotient: Tensor,
    rows: Sequence[int],
    first: list[Tensor | None],
    last: Sequence[Tensor | None],
) -> list[Tensor]:
    """Step 5: -(first - last) / (2 quotient) + explicit, in the memory of `first`; a gradient that is None counts as
    zeros. `rows` of lambda; both terms by what this rank's losses count for.

    The arithmetic is in float32, or float64 for float64 gradients, whatever the dtype of lambda.
    """
    params = [local(problem.meta_params[row]) for row in rows]
    results = [torch.zeros_like(p) if g is None else g for p, g in zip(params, first, strict=True)]
    others = [torch.zeros_like(p) if g is None else g for p, g in zip(results, last, strict=True)]
    if not rows:
        return results
    base_share, meta_share = ranks.shares_of(rows[0])  # the same for all of them
    # A rank that counts for nothing has a share of 0: its part is 0, also where it has no derivative (0 / 0).
    shared = torch.where(quotient == 0, 0.0, quotient / base_share)
    for has_explicit in (False, True):
        chosen = [i for i, row in enumerate(rows) if (explicit[row] is not None) == has_explicit]
        if chosen:
            terms = scaling.explicit_terms(problem, [explicit[rows[i]] for i in chosen], meta_share)
            ops.central_difference(
                [results[i] for i in chosen], [others[i] for i in chosen], terms, shared, size.explicit,
                backend=problem.backend,
            )  # fmt: skip
    return results
