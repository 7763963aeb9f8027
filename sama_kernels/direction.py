"""v = D d: the adaptation to the optimizer and to gradient clipping, over all ranks that have parts of theta."""

from __future__ import annotations

import torch
from torch import Tensor

from sama_kernels import adaptation as adaptations
from sama_kernels import clipping
from sama_kernels.distributed import Adapt, sharded
from sama_kernels.types import Problem


def adaptation_of(problem: Problem) -> Adapt:
    """What turns d into v = D d, in place, and gives the parts of ||v||^2 over all ranks."""
    plan = adaptations.plan(
        problem.optimizer, problem.step_params, problem.adaptation,
        name=problem.step_params_name, skipped=problem.skipped is True,
    )  # fmt: skip
    clipped = clipping.gradients(problem)

    def adapt(v: list[Tensor | None]) -> list[Tensor]:
        return clipping.apply(problem, clipped, v, adaptations.apply(plan, v, problem.backend))

    divided = sharded.by_groups(problem.base_params, range(len(problem.base_params)))
    if set(divided) == {()}:
        return adapt

    def adapt_parts(v: list[Tensor | None]) -> list[Tensor]:
        norm_sqs = []
        for groups, rows in divided.items():
            part = [x if row in rows else None for row, x in enumerate(v)]
            if any(x is not None for x in part):
                norm_sq = torch.stack(adapt(part)).sum()
            else:  # as where a bucket has plain parameters alone
                norm_sq = torch.zeros((), dtype=torch.float64, device=problem.base_params[0].device)
            norm_sqs.append(sharded.sum_over(norm_sq, groups))
            for row in rows:
                v[row] = part[row]
        return norm_sqs

    return adapt_parts
