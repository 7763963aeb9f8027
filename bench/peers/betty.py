"""Betty (Choe et al., "Betty: an automatic differentiation library for multilevel optimization", 2023): betty-ml.

0.1.1 has no SAMA; its "darts" is SAMA without the adaptation. After it, theta stays at theta - epsilon v, as its last
line (`p.data.add`) is not in place; the benchmark puts theta back outside of what is timed. Its "cg" makes the next
direction from the old residual, so that it is conjugate gradients for one iteration only; its cost is that of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.algorithm_cases import Case, Task, algorithms, gradient
from bench.measure import installed

PACKAGE, VERSION = "betty-ml", "0.1.1"
STEP_SIZE = 0.1  # of Neumann; alpha of the difference is 1, as ours


def cases(task: Task, terms: int, unrolls: Sequence[int]) -> list[Case]:
    """Its three hypergradients; `unrolls` does not matter to them."""
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
    return [
        Case(
            name, source, shown[name], meta_gradient(task, config), peer_of=partial(gradient, task, same[name]),
            differs=differs.get(name, ""),
        )
        for name, config in settings.items()
    ]  # fmt: skip


def meta_gradient(task: Task, config: Any) -> Any:
    """What its `Problem.one_step_descent` does for the meta level, up to the optimizer's step."""
    import logging

    from betty.configs import Config
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    class Base(ImplicitProblem):
        def training_step(self, batch: object) -> Tensor:
            return task.base_loss()

    class Meta(ImplicitProblem):
        def training_step(self, batch: object) -> Tensor:
            return task.meta_loss()

    logging.disable(logging.INFO)
    batches = [(torch.zeros(1),)]  # both losses have theirs
    base = Base("base", config, task.net, task.optimizer, None, batches)
    meta = Meta("meta", Config(retain_graph=True), task.weigher, None, None, batches)
    Engine(problems=[meta, base], dependencies={"u2l": {meta: [base]}, "l2u": {base: [meta]}})
    logging.disable(logging.NOTSET)

    def find() -> list[Tensor | None]:
        base.cur_batch = base.get_batch()
        loss, _ = meta.get_loss(meta.get_batch())
        meta.zero_grad()  # what base steps have left there
        lam = meta.trainable_parameters()
        meta.backward(loss=loss, params=lam, paths=meta.paths, retain_graph=True, allow_unused=True)
        return [p.grad for p in lam]

    return find
