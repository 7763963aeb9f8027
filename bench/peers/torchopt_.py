"""TorchOpt (Ren et al., "TorchOpt: an efficient library for differentiable optimization", 2023).

Reverse mode through its MetaAdam, and its `custom_root` for implicit differentiation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from bench.algorithm_cases import Case, Task, algorithms, gradient
from bench.measure import installed
from sama_kernels.algorithms import Iterative

PACKAGE, VERSION = "torchopt", "0.7.3"
STEP_SIZE = 0.1


def cases(task: Task, terms: int, unrolls: Sequence[int]) -> list[Case]:
    """Iterative differentiation for each unroll length, conjugate gradients and Neumann."""
    from torchopt import linear_solve

    source = f"{PACKAGE} {installed(PACKAGE)}"
    found = [
        Case(
            "iterative", source, f"MetaAdam, {steps} step{'s' * (steps > 1)}", partial(unrolled, task, steps), steps,
            keeps_steps=True, peer_of=partial(gradient, task, Iterative(steps=steps)),
        )
        for steps in unrolls
    ]  # fmt: skip
    solvers = {
        "neumann": linear_solve.solve_inv(ns=True, maxiter=terms, alpha=STEP_SIZE),
        "conjugate_gradient": linear_solve.solve_cg(maxiter=terms, rtol=0.0),
    }
    shown = {
        "neumann": f"custom_root, solve_inv(ns=True, maxiter={terms}, alpha={STEP_SIZE})",
        "conjugate_gradient": f"custom_root, solve_cg(maxiter={terms}, rtol=0)",
    }
    for name, solver in solvers.items():
        same = partial(gradient, task, algorithms(terms)[name])
        found.append(Case(name, source, shown[name], implicit(task, solver), peer_of=same))
    return found


def unrolled(task: Task, steps: int) -> Sequence[Tensor | None]:
    """With the state of the task's Adam; afterwards the net has its own parameters again."""
    import torchopt

    group = task.optimizer.param_groups[0]
    optimizer = torchopt.MetaAdam(task.net, lr=group["lr"], betas=group["betas"], eps=group["eps"])
    containers = optimizer.param_containers_groups[0]
    before = [dict(container) for container in containers]
    optimizer.state_groups[0] = state_of(task, optimizer, containers)
    try:
        for _ in range(steps):
            optimizer.step(task.weighted(task.losses(0)))
        return torch.autograd.grad(task.meta_loss(), tuple(task.weigher.parameters()))
    finally:
        for container, parameters in zip(containers, before, strict=True):
            container.update(parameters)


def state_of(task: Task, optimizer: Any, containers: Any) -> Any:
    """The moments and step counts of the task's Adam, in its form."""
    from torchopt import pytree

    params = pytree.tree_leaves(containers)
    states = [task.optimizer.state[p] for p in params]
    fresh = optimizer.impl.init(tuple(params))
    adam = next(part for part in fresh if hasattr(part, "mu"))
    filled = adam._replace(
        mu=tuple(s["exp_avg"] for s in states),
        nu=tuple(s["exp_avg_sq"] for s in states),
        count=tuple(s["step"].long() for s in states),
    )
    return tuple(filled if part is adam else part for part in fresh)


def implicit(task: Task, solver: Any) -> Callable[[], Sequence[Tensor | None]]:
    """theta is its own solution; the Hessian is that of the weighted loss."""
    from torchopt.diff.implicit import custom_root

    theta = dict(task.net.named_parameters())
    lam = dict(task.weigher.named_parameters())

    def loss(values: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        net = partial(functional_call, task.net, dict(zip(theta, values, strict=True)))
        weigher = partial(functional_call, task.weigher, dict(zip(lam, weights, strict=True)))
        return task.weighted(task.losses_of(net, 0), weigher)

    @custom_root(torch.func.grad(loss), argnums=1, solve=solver)
    def solution(values: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return values

    def find() -> Sequence[Tensor | None]:
        weights = tuple(lam.values())
        found = solution(tuple(theta.values()), weights)
        net = partial(functional_call, task.net, dict(zip(theta, found, strict=True)))
        return torch.autograd.grad(task.losses_of(net, 1).mean(), weights)

    return find
