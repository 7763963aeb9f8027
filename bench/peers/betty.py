"""Betty (Choe et al., "Betty: an automatic differentiation library for multilevel optimization", 2023): betty-ml.

0.1.1 has no SAMA; its "darts" is SAMA without the adaptation. After it, theta stays at theta - epsilon v, as its last
line (`p.data.add`) is not in place; the benchmark puts theta back outside of what is timed. Its "cg" makes the next
direction from the old residual, so that it is conjugate gradients for one iteration only; its cost is that of them.

Its `IterativeProblem` unrolls its own Adam, in which epsilon stands where torch has it. It is given the task's
parameters and moments without the copies that it would make of them, and so takes less memory here than in Betty's own
loop. There each step also leaves its graph behind for good: the gradient in a parameter's `.grad` refers to the
parameter, and after the step only the new parameters' `.grad` is deleted. Here that is done afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.algorithm_cases import Case, Task, algorithms, gradient
from bench.measure import installed
from sama_kernels.algorithms import Iterative

PACKAGE, VERSION = "betty-ml", "0.1.1"
STEP_SIZE = 0.1  # of Neumann; alpha of the difference is 1, as ours


def cases(task: Task, terms: int, unrolls: Sequence[int]) -> list[Case]:
    """Its three implicit hypergradients, and iterative differentiation for each unroll length."""
    from betty.configs import Config

    same = algorithms(terms)
    settings = {
        "sama_na": Config(type="darts", darts_alpha=1.0),
        "neumann": Config(type="neumann", neumann_iterations=terms, neumann_alpha=STEP_SIZE),
        "conjugate_gradient": Config(type="cg", cg_iterations=terms, cg_alpha=1.0),
    }
    shown = {
        "sama_na": "type=darts, darts_alpha=1",
        "neumann": f"type=neumann, neumann_iterations={terms}, neumann_alpha={STEP_SIZE}",
        "conjugate_gradient": f"type=cg, cg_iterations={terms}, cg_alpha=1",
    }
    source = f"{PACKAGE} {installed(PACKAGE)}"
    differs = {"conjugate_gradient": "its next direction is made from the old residual"} if terms > 1 else {}
    implicit = [
        Case(
            name, source, shown[name], meta_gradient(task, config), peer_of=partial(gradient, task, same[name]),
            differs=differs.get(name, ""),
        )
        for name, config in settings.items()
    ]  # fmt: skip
    iterative = [
        Case(
            "iterative", source, f"IterativeProblem, unroll_steps={steps}", unrolled(task, steps), steps,
            keeps_steps=True, peer_of=partial(gradient, task, Iterative(steps=steps)),
        )
        for steps in unrolls
    ]  # fmt: skip
    return implicit + iterative


def meta_gradient(task: Task, config: Any) -> Callable[[], Sequence[Tensor | None]]:
    """What its `Problem.one_step_descent` does for the meta level, up to the optimizer's step."""
    from betty.configs import Config
    from betty.problems import ImplicitProblem

    class Base(ImplicitProblem):
        def training_step(self, batch: object) -> Tensor:
            return task.base_loss()

    base, meta = problems(task, Base, config, Config(retain_graph=True), task.meta_loss)

    def find() -> list[Tensor | None]:
        base.cur_batch = base.get_batch()
        return descend(meta)

    return find


def unrolled(task: Task, steps: int) -> Callable[[], Sequence[Tensor | None]]:
    """Its `one_step_descent` for every base step, then for the meta level, up to the optimizer's step."""
    from betty.configs import Config
    from betty.problems import IterativeProblem

    past: list[Tensor] = []  # parameters before each step

    class Base(IterativeProblem):
        def initialize_optimizer_state(self) -> None:
            """The task's Adam has its state; a step with gradients of zero would change it."""

        def net(self, ids: Tensor) -> Any:
            return self.fmodule(self.params, self.buffers, ids)

        def training_step(self, batch: object) -> Tensor:
            return task.weighted(task.losses_of(self.net, 0))

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            past.extend(self.params)
            super().optimizer_step(*args, **kwargs)

        def start(self) -> None:
            """At theta and the state of Adam, in the memory of the task."""
            for p in past:
                p.grad = None
            past.clear()
            self.params = tuple(p.detach().requires_grad_() for p in task.net.parameters())
            states = [task.optimizer.state[p] for p in task.net.parameters()]
            self.optimizer.state = [{**state, "step": state["step"].clone()} for state in states]

    def meta_loss() -> Tensor:
        return task.losses_of(base.net, 1).mean()

    base, meta = problems(task, Base, Config(retain_graph=True), Config(first_order=False), meta_loss)
    base.start()  # nor the copy of theta that it was made with

    def find() -> list[Tensor | None]:
        base.start()
        try:
            for _ in range(steps):
                base.one_step_descent()
            return descend(meta)
        finally:
            base.start()

    return find


def problems(task: Task, base_type: Any, base_config: Any, meta_config: Any, meta_loss: Callable[[], Tensor]) -> Any:
    """The two levels, joined by its engine."""
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    class Meta(ImplicitProblem):
        def training_step(self, batch: object) -> Tensor:
            return meta_loss()

    batches = [(torch.zeros(1),)]  # both losses have theirs
    with quiet():
        base = base_type("base", base_config, task.net, task.optimizer, None, batches)
        meta = Meta("meta", meta_config, task.weigher, None, None, batches)
        Engine(problems=[meta, base], dependencies={"u2l": {meta: [base]}, "l2u": {base: [meta]}})
    return base, meta


def descend(meta: Any) -> list[Tensor | None]:
    """The meta gradient; what base steps have left in its place is removed first."""
    loss, _ = meta.get_loss(meta.get_batch())
    meta.zero_grad()
    lam = meta.trainable_parameters()
    meta.backward(loss=loss, params=lam, paths=meta.paths, retain_graph=True, allow_unused=True)
    return [p.grad for p in lam]


@contextmanager
def quiet() -> Iterator[None]:
    """Without its log lines."""
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(disabled)
