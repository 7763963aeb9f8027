"""higher (Grefenstette et al., "Generalized inner loop meta-learning", 2019): reverse mode through the optimizer.

Its Adam, like that of older torch, adds epsilon before the bias correction of the denominator: with epsilon = 1e-8 its
meta gradient is 2 % from ours on a toy BERT, with 1e-12 it is 3e-6.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from bench.algorithm_cases import Case, Task, gradient
from bench.measure import installed
from sama_kernels.algorithms import Iterative

PACKAGE, VERSION = "higher", "0.2.1"


def cases(task: Task, terms: int, unrolls: Sequence[int]) -> list[Case]:
    """Iterative differentiation, for each unroll length."""
    source = f"{PACKAGE} {installed(PACKAGE)}"
    return [
        Case(
            "iterative", source, f"innerloop_ctx, DifferentiableAdam, {steps} step{'s' * (steps > 1)}",
            partial(unrolled, task, steps), steps, keeps_steps=True,
            peer_of=partial(gradient, task, Iterative(steps=steps)),
        )
        for steps in unrolls
    ]  # fmt: skip


def unrolled(task: Task, steps: int) -> Sequence[Tensor | None]:
    """The optimizer's state goes in with it."""
    import higher

    with higher.innerloop_ctx(task.net, task.optimizer) as (net, optimizer):
        for _ in range(steps):
            optimizer.step(task.weighted(task.losses_of(net, 0)))
        return torch.autograd.grad(task.losses_of(net, 1).mean(), tuple(task.weigher.parameters()))
