"""dL_base/dlambda differentiated along v, in the three ways that `difference` names."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sama_kernels import ops, scaling
from sama_kernels.buffers import BufferGuard
from sama_kernels.guards import Interrupts, RngState
from sama_kernels.jvp import TangentPass, tangents
from sama_kernels.passes import Perturbation, PerturbedPasses
from sama_kernels.scaling import StepSize
from sama_kernels.types import Problem


@dataclass
class Sides:
    """What the derivative along v is made of: -(plus - minus) / (2 size.quotient).

    Attributes:
        loss_plus, loss_minus: L_base on both sides, 0-dim.
        plus, minus: dL_base/dlambda there, one per meta parameter; None where lambda is not read.
        size: the step size, with the quotient that belongs to these two.
        step: what was realised of theta+ - theta (`Perturbation.plus`); None if that was not measured.
        overflow: whether scaled gradients overflowed (`scaling.overflow`).
    """

    loss_plus: Tensor
    loss_minus: Tensor
    plus: list[Tensor | None]
    minus: list[Tensor | None]
    size: StepSize
    step: Tensor | None
    overflow: Tensor | None


def evaluate(
    problem: Problem, theta: Perturbation, size: StepSize, buffers: BufferGuard, rng: RngState, interrupts: Interrupts
) -> Sides:
    """The base passes of a meta step; theta is frozen, and at theta or (`Perturbation.keep`) theta- afterwards."""
    if problem.difference == "exact":
        return _exact(problem, theta, size, TangentPass(problem, buffers, rng, interrupts))
    passes = PerturbedPasses(problem, buffers, rng, interrupts)
    if problem.difference == "forward":
        return _forward(problem, theta, size, passes)
    return _central(problem, theta, size, passes)


def _central(problem: Problem, theta: Perturbation, size: StepSize, passes: PerturbedPasses) -> Sides:
    """From theta - epsilon v to theta + epsilon v: the error is of second order in epsilon (paper, Eq. 5)."""
    step = theta.plus(size.along, problem.rounding, problem.seed)
    loss_plus, plus = passes.at_plus(theta)
    theta.minus(size.along)
    loss_minus, minus = passes.at_other_side()
    overflow = scaling.overflow(problem, plus, minus)
    if problem.update_base:
        theta.keep(unless=overflow)
    return Sides(loss_plus, loss_minus, plus, minus, size, step, overflow)


def _forward(problem: Problem, theta: Perturbation, size: StepSize, passes: PerturbedPasses) -> Sides:
    """From theta to theta + epsilon v: first order, but the pass at theta also finds the values to be held."""
    loss, at_theta = passes.at_theta()
    step = theta.plus(size.along, problem.rounding, problem.seed)
    loss_plus, plus = passes.at_other_side()
    overflow = scaling.overflow(problem, plus, at_theta)
    if problem.update_base:
        theta.minus(size.along)
        theta.keep(unless=overflow)
    return Sides(loss_plus, loss, plus, at_theta, replace(size, quotient=size.quotient / 2), step, overflow)


def _exact(problem: Problem, theta: Perturbation, size: StepSize, only: TangentPass) -> Sides:
    """The derivative along v / ||v|| in forward mode, times ||v||: v itself may be too small for 16-bit tangents."""
    length = size.epsilon * size.norm  # of the step that the other differences make

    def per_length(x: Tensor) -> Tensor:
        return torch.where(size.degenerate, 0.0, x / length)

    if theta.v:
        ops.adapt_norm_scale(theta.v, 1.0, lr=per_length(size.along), backend=problem.backend)
    with tangents(theta.params, theta.v):
        loss, derivative = only.at_theta()
    overflow = scaling.overflow(problem, derivative, ())
    if problem.update_base:
        theta.plus(torch.where(size.degenerate, 0.0, -length), problem.rounding, problem.seed)
        theta.keep(unless=overflow)
    zeros = [None if g is None else torch.zeros_like(g) for g in derivative]
    size = replace(size, quotient=per_length(size.quotient / 2))
    return Sides(loss, loss, derivative, zeros, size, None, overflow)
