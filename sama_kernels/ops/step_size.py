"""`step_size`: epsilon = alpha / ||v|| on the device (paper, below Eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sama_kernels import backends
from sama_kernels.backends import reference
from sama_kernels.ops._library import define, refuse_gradients


def step_size(norm_sqs: Sequence[Tensor], alpha: float, tiny: float, *, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The step size that moves theta by `alpha` along v, with a flag instead of a division by zero.

    Arguments:
        norm_sqs: parts of ||v||^2 (one per parameter group), float64, 0-dim, summed in list order.
        alpha: length of the perturbation, > 0.
        tiny: norms up to this one are taken for zero.
    Returns:
        norm (float64), epsilon = alpha / norm (float64), degenerate (bool); 0-dim, on the device of `norm_sqs`.
        Where the norm is tiny or not finite, degenerate is True and epsilon is 0, which every other op reads as
        "leave theta and the gradient alone". Nothing is copied to the host.
    """
    refuse_gradients("step_size", norm_sqs=norm_sqs)
    norm, epsilon, degenerate = backends.kernel("step_size", backend)(norm_sqs, alpha, tiny)
    return norm, epsilon, degenerate


def _fake(norm_sqs: Sequence[Tensor], alpha: float, tiny: float) -> tuple[Tensor, Tensor, Tensor]:
    like = norm_sqs[0]
    return like.new_empty(()), like.new_empty(()), like.new_empty((), dtype=torch.bool)


define(
    "step_size(Tensor[] norm_sqs, float alpha, float tiny) -> (Tensor, Tensor, Tensor)",
    reference=reference.step_size,
    fake=_fake,
)
