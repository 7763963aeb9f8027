"""The methods that are compared, and every setting of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sama_kernels.algorithms import Algorithm, ConjugateGradient, Neumann, Sama, SamaNA


@dataclass(frozen=True)
class Settings:
    """Settings that all runs share; the defaults are those of the command line.

    Attributes:
        strength: of the proximal term, iMAML's lambda.
        inner_steps: steps of the base level, in training and in test alike.
        scratch_lr, scratch_steps: the learning rate of the baselines without meta learning, and the steps of the one
            that may take longer.
        meta_batch: tasks that one meta gradient is averaged over.
        queries: query images of each class, in training; None: as many as support images. test_queries: in test.
        alpha: length of SAMA's perturbation. The proximal term is a quadratic, so it makes no difference here but by
            rounding (see docs/few_shot.md).
        damping: of conjugate gradients.
    """

    ways: int = 20
    norm: str = "batch"
    downsample: str = "stride"
    inner_optimizer: str = "sgd"
    inner_lr: float = 0.5
    inner_steps: int = 5
    strength: float = 0.2
    meta_steps: int = 80
    meta_batch: int = 2
    meta_lr: float = 1e-2
    meta_schedule: str = "cosine"
    queries: int | None = 5
    alpha: float = 1.0
    damping: float = 0.0
    solver_steps: int = 5
    scratch_lr: float = 1.0
    scratch_steps: int = 50
    test_tasks: int = 30
    test_queries: int = 5


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        key: name on the command line.
        title: name in the table.
        proximal: the base loss holds the proximal term.
        algorithm: makes the algorithm of `meta_grad` from the settings; None: no implicit differentiation.
        learns: whether there is meta training at all.
        longer: the base level of a test task takes `scratch_steps` steps.
        second_order: the algorithm makes Hessian-vector products.
    """

    key: str
    title: str
    proximal: bool = True
    algorithm: Callable[[Settings], Algorithm] | None = None
    learns: bool = True
    longer: bool = False
    second_order: bool = False


def _sama(_: Settings) -> Algorithm:
    return Sama()


def _sama_na(_: Settings) -> Algorithm:
    return SamaNA()


def _conjugate_gradient(settings: Settings) -> Algorithm:
    return ConjugateGradient(iterations=settings.solver_steps, damping=settings.damping)


def _neumann(settings: Settings) -> Algorithm:
    return Neumann(terms=settings.solver_steps, step_size=settings.inner_lr)


METHODS = {
    method.key: method
    for method in (
        Method("scratch", "no meta learning", proximal=False, learns=False),
        Method("scratch-long", "no meta learning, more steps", proximal=False, learns=False, longer=True),
        Method("fomaml", "first-order MAML", proximal=False),
        Method("sama", "SAMA", algorithm=_sama),
        Method("sama_na", "SAMA-NA", algorithm=_sama_na),
        Method("conjugate_gradient", "iMAML (conjugate gradients)", algorithm=_conjugate_gradient, second_order=True),
        Method("neumann", "Neumann series", algorithm=_neumann, second_order=True),
    )
}
