"""What `bench.algorithms` measures: one task, and a case for every algorithm of ours and of a peer on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sama_kernels as sk
from bench.meta_step import Workload
from sama_kernels.algorithms import (
    T1T2,
    Algorithm,
    ConjugateGradient,
    Iterative,
    Neumann,
    Nystrom,
    Sama,
    SamaNA,
    Truncated,
)

ATTENTION = "eager"  # fused attention has no second derivative


class Task(Workload):
    """`Workload`, for callers that bring their own net (with the parameters of a later step).

    What the weight net reads is the batch's losses, held; or `held`, of shape (batch,), once that is set. Then every
    library differentiates the same function, whatever it makes of held values.
    """

    held: Tensor | None = None

    def losses_of(self, net: Callable[..., Any], k: int) -> Tensor:
        """Per-sample losses of batch k by `net`, shape (batch,)."""
        return F.cross_entropy(net(self.ids[k]).logits, self.labels[k], reduction="none")

    def weighted(self, losses: Tensor, weigher: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The mean of weight times loss, 0-dim."""
        held = sk.stop_gradient(losses) if self.held is None else self.held
        return ((weigher or self.weigher)(held[:, None]).squeeze(1) * losses).mean()

    def base_loss(self) -> Tensor:
        """Weighted loss of the base batch."""
        return self.weighted(self.losses(0))

    def without_randomness(self) -> None:
        """The same function for all: no dropout, and Adam's epsilon too small for its place in the formula to matter.

        The weight net reads fixed numbers, far apart: near ones make meta gradients parallel. Steps are made, so that
        Adam has its state.
        """
        self.net.eval()
        self.held = torch.linspace(0.0, 4.0, len(self.labels[0]), device=self.labels.device)
        self.optimizer.param_groups[0]["eps"] = 1e-12
        for _ in range(3):
            self.weighted_step()


@dataclass(frozen=True)
class Case:
    """One way to a meta gradient.

    Arguments:
        name: of the algorithm, as `meta_grad(algorithm=...)` takes it; for a peer, that of ours which it equals.
        source: whose implementation it is, with its version.
        settings: what it was called with.
        meta: one meta gradient, a tensor per parameter of the weight net.
        steps: how many steps of the optimizer it differentiates through; None where the unroll length does not matter.
        keeps_steps: those steps are the base steps too; else theta is put back, and they are made again.
        peer_of: for a peer's, ours with the same settings, for the comparison.
        differs: why the two are not the same function, although their names and settings are; empty if they are.
    """

    name: str
    source: str
    settings: str
    meta: Callable[[], Sequence[Tensor | None]]
    steps: int | None = None
    keeps_steps: bool = False
    peer_of: Callable[[], Sequence[Tensor | None]] | None = None
    differs: str = ""

    @property
    def key(self) -> str:
        return f"{self.source}: {self.name}" + (f", {self.steps} step{'s' * (self.steps > 1)}" if self.steps else "")


OURS = "sama_kernels"


def algorithms(terms: int) -> dict[str, Algorithm]:
    """Each with `terms` products with the Hessian, where it makes any."""
    return {
        "sama": Sama(),
        "sama_na": SamaNA(),
        "t1_t2": T1T2(),
        "neumann": Neumann(terms=terms),
        "conjugate_gradient": ConjugateGradient(iterations=terms),
        "nystrom": Nystrom(rank=terms),
        "truncated": Truncated(steps=terms + 1),
    }


def ours(task: Task, terms: int, unrolls: Sequence[int]) -> list[Case]:
    """Every algorithm of this library; those that differentiate through steps once per unroll length."""
    cases = [case(task, name, algorithm) for name, algorithm in algorithms(terms).items()]
    for steps in unrolls:
        cases.append(case(task, "iterative", Iterative(steps=steps, advance=True), steps))
        if steps > 1:
            checkpoint = Iterative(steps=steps, checkpoint=True, advance=True)
            cases.append(case(task, "iterative, checkpoint", checkpoint, steps))
    return cases


def case(task: Task, name: str, algorithm: Algorithm, steps: int | None = None) -> Case:
    return Case(name, OURS, repr(algorithm), partial(gradient, task, algorithm), steps, keeps_steps=steps is not None)


def gradient(task: Task, algorithm: Algorithm) -> Sequence[Tensor]:
    """Ours."""
    return task.meta_step(algorithm=algorithm).grads


def compare(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> tuple[float, float]:
    """Cosine of two meta gradients, and ||a - b|| / ||b||, in float64.

    The cosine alone says little: with few meta parameters that matter, even wrong ones are nearly parallel.
    """
    x, y = (torch.cat([t.detach().flatten().double() for t in found if t is not None]) for found in (a, b))
    return float(F.cosine_similarity(x, y, dim=0)), float((x - y).norm() / y.norm())
