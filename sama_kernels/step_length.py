"""epsilon = alpha / ||v||, with alpha as a length or as a fraction of ||theta||, all of it on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sama_kernels import ops
from sama_kernels.distributed.sharded import by_groups, local, sum_over
from sama_kernels.types import Problem, Relative


def step_size(problem: Problem, norm_sqs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """||v||, epsilon and the degenerate flag, 0-dim, as `ops.step_size` returns them.

    A relative alpha is degenerate too where fraction * ||theta|| is no length: zero or not finite.
    """
    alpha, backend = problem.alpha, problem.backend
    if not isinstance(alpha, Relative):
        return ops.step_size(norm_sqs, alpha, problem.tiny, backend=backend)
    norm, per_length, degenerate = ops.step_size(norm_sqs, alpha.fraction, problem.tiny, backend=backend)
    epsilon = per_length * norm_of(problem.base_params, backend)
    degenerate = degenerate | ~(epsilon.isfinite() & (epsilon > 0))
    return norm, torch.where(degenerate, 0.0, epsilon), degenerate


def norm_of(params: Sequence[Tensor], backend: str) -> Tensor:
    """||params||_2 over all tensors, float64, 0-dim, summed in a fixed order. Bytes moved: one read of `params`."""
    squares = []
    for groups, rows in by_groups(params, range(len(params))).items():
        # .data has a version counter of its own: the op, which writes nothing at scale 1, counts as in place.
        parts = [local(params[row]).data for row in rows]
        squares.append(sum_over(ops.adapt_norm_scale(parts, 1.0, backend=backend), groups))
    return torch.stack(squares).sum().sqrt()
