"""Training with one method: base steps on weak and clean batches, and a meta step after every few of them."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sama_kernels as sk
from sama_kernels.algorithms import Algorithm, ConjugateGradient, Iterative, Neumann, Nystrom, Truncated

from ..common import processes
from ..common.batches import shuffled_batches
from ..common.checkpoints import random_state, set_random_state
from ..common.encoder import EncodedTexts, TextClassifier
from ..common.errors import ExperimentError
from .cosine import REFRESH, cosine_loss
from .evidence import START_GATE, ExampleEvidence
from .methods import Method, Settings


@dataclass(frozen=True)
class Task:
    """The encoded texts of one seed and what is known about them; all tensors are on the training device.

    The ``*_index`` fields are the rows that count: of the dev texts those with a clean label, of the others those to
    score.
    """

    train: EncodedTexts
    train_labels: Tensor
    evidence: ExampleEvidence
    clean: EncodedTexts
    clean_labels: Tensor
    clean_index: Tensor
    scored: EncodedTexts
    scored_labels: Tensor
    scored_index: Tensor
    classes: int
    new_classifier: Callable[[], TextClassifier]


class MetaLearners(nn.Module):
    """The weight net and, for R & C, the label corrector: together they make the loss on a weak batch."""

    def __init__(self, evidence: ExampleEvidence, classes: int, settings: Settings, corrects: bool) -> None:
        super().__init__()
        features = evidence.features.shape[1]
        self.evidence = evidence
        self.weight_net = sk.nn.MetaWeightNet(features + classes, settings.meta_hidden)
        self.corrector = sk.nn.LabelCorrector(features, classes, settings.meta_hidden, START_GATE) if corrects else None

    def forward(self, logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """logits [B, C] of the training texts ``index`` -> losses [B], weights [B], targets [B, C]."""
        features, weak, covered = self.evidence.of(index)
        targets = weak if self.corrector is None else self.corrector(features, weak, covered)
        losses = F.cross_entropy(logits, targets, reduction="none")
        # The weights are functions of the loss, but the base gradient does not flow through them.
        return losses, self.weight_net(sk.stop_gradient(losses), torch.cat([features, weak], dim=1)), targets


class Trainer:
    """A fresh classifier (and meta learners) and everything that one training step needs.

    With several processes each takes its part of every batch; base and meta gradients are those of the whole batch.
    """

    def __init__(self, task: Task, method: Method, settings: Settings, seed: int) -> None:
        torch.manual_seed(seed)
        # One generator for each stream of batches: every method then sees the same weak batches in the same order.
        draws = [torch.Generator().manual_seed(3 * seed + stream) for stream in range(3)]
        self.task = task
        self.method = method
        self.settings = settings
        self.steps = settings.steps if method.weak else settings.clean_steps
        self.weak_steps = (self.steps - settings.clean_steps if method.then_clean else self.steps) if method.weak else 0
        if method.self_training:
            self.weak_steps = max(1, self.steps // 2)
        if method.weak and self.weak_steps < 1:
            raise ExperimentError(f"--steps {self.steps}: {method.key} needs more than --clean-steps of them")
        self.step_count = 0
        self.degenerate: list[Tensor] = []
        self.model = task.new_classifier().train()
        self.averaged_model = processes.averaging(self.model)
        self._begin_stage(self.weak_steps or self.steps)
        self.learners: MetaLearners | None = None
        if method.meta:
            self.learners = MetaLearners(task.evidence, task.classes, settings, method.corrects)
            self.learners.to(task.clean_labels.device)
            self.meta_optimizer = torch.optim.Adam(self.learners.parameters(), lr=settings.meta_lr)
            if settings.clean_in_base and not method.sama:
                raise ExperimentError(f"--clean-in-base: {method.key} differentiates the weak loss alone; leave it out")
        self.recent: deque[tuple[Tensor, float]] = deque(maxlen=settings.unroll)  # weak batches, for "iterative"
        self.teacher: TextClassifier | None = None

        weak_rows = torch.arange(len(task.train_labels), device=task.train_labels.device)
        if not (settings.abstentions and method.corrects):
            weak_rows = weak_rows[task.evidence.covered]
        if len(weak_rows) == 0:
            raise ExperimentError("no training text has a weak label")
        beside_weak = method.weak and not method.then_clean
        clean_size = settings.clean_batch_size if beside_weak else settings.batch_size
        self.clean_in_base = method.clean or (method.meta and settings.clean_in_base)
        self.batches = {
            "weak": shuffled_batches(weak_rows, task.train.lengths, settings.batch_size, draws[0]),
            "clean": shuffled_batches(task.clean_index, task.clean.lengths, clean_size, draws[1]),
            "meta": shuffled_batches(task.clean_index, task.clean.lengths, settings.meta_batch_size, draws[2]),
        }
        if method.self_training:  # needs no weak labels any more, so it takes all texts
            everything = torch.arange(len(task.train_labels), device=task.train_labels.device)
            self.batches["all"] = shuffled_batches(everything, task.train.lengths, settings.batch_size, draws[1])
        self.drawn = dict.fromkeys(self.batches, 0)
        processes.own_random_numbers(seed)

    def step(self) -> None:
        """One base step and, where the schedule says so, one meta step."""
        method, settings = self.method, self.settings
        if (method.then_clean or method.self_training) and self.step_count == self.weak_steps:
            self._begin_stage(self.steps - self.weak_steps)
        self.step_count += 1
        on_weak = self.step_count <= self.weak_steps
        self.optimizer.zero_grad()
        if on_weak:
            rows, weak_share = processes.my_part(self._next("weak"))
            self.recent.append((rows, weak_share))
            weak_loss = self._weak_loss(rows)
            torch.autograd.backward(weak_share * weak_loss())
        if method.self_training and not on_weak:
            self._self_training_backward()
        elif self.clean_in_base or not on_weak:
            weight = settings.clean_weight if on_weak else 1.0
            rows, share = processes.my_part(self._next("clean"))
            torch.autograd.backward(weight * share * self._clean_loss(rows))
        self.optimizer.step()
        meta_due = on_weak and self.step_count > settings.meta_start and self.step_count % settings.unroll == 0
        if self.learners is not None and meta_due:
            self._meta_step(self.learners, weak_loss, weak_share, self._next("meta"))
        self.scheduler.step()

    def state(self) -> dict[str, Any]:
        """Everything that the next steps depend on, for `load`."""
        found = {"step_count": self.step_count, "drawn": self.drawn, "random": random_state()}
        found |= {"degenerate": self.degenerate, "recent": list(self.recent)}
        return found | {name: part.state_dict() for name, part in self._parts().items()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; this trainer must be fresh, and made with the same arguments."""
        self.step_count = state["step_count"]
        if self.step_count > self.weak_steps:
            self._begin_stage(self.steps - self.weak_steps)
        if state.keys() >= {"teacher"}:
            self.teacher = copy.deepcopy(self.model)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        device = self.task.train_labels.device
        self.degenerate = [flag.to(device) for flag in state["degenerate"]]
        self.recent.extend((rows.to(device), share) for rows, share in state["recent"])
        for stream, count in state["drawn"].items():
            for _ in range(count):
                self._next(stream)
        set_random_state(state["random"])

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        if self.learners is not None:
            parts |= {"learners": self.learners, "meta_optimizer": self.meta_optimizer}
        return parts if self.teacher is None else parts | {"teacher": self.teacher}

    def _next(self, stream: str) -> Tensor:
        self.drawn[stream] += 1
        return next(self.batches[stream])

    def _begin_stage(self, steps: int) -> None:
        """A fresh optimizer, and the learning rate's way from warm-up to 0 over so many steps."""
        settings = self.settings
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=settings.base_lr, weight_decay=settings.weight_decay
        )

        def rate(step: int) -> float:
            warmup = min(1.0, (step + 1) / max(settings.base_warmup, 1))
            return warmup * 0.5 * (1 + math.cos(math.pi * step / steps))

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)

    def _weak_loss(self, rows: Tensor) -> Callable[[], Tensor]:
        """The loss on the weak labels of ``rows`` as a closure, for the base step and the perturbed passes alike."""

        @sk.recorded  # keeps the held losses of the base step, which saves the meta step a forward pass
        def weak_loss() -> Tensor:
            logits = self.averaged_model(self.task.train.batch(rows))
            if self.learners is None:
                return F.cross_entropy(logits, self.task.evidence.weak_targets[rows])
            losses, weights, _ = self.learners(logits, rows)
            weighted: Tensor = (weights * losses).mean()
            return weighted

        return weak_loss

    def _self_training_backward(self) -> None:
        """The gradient of COSINE's loss on a batch of all texts."""
        if self.teacher is None or (self.step_count - self.weak_steps - 1) % REFRESH == 0:
            self.teacher = copy.deepcopy(self.model).eval()
        rows, share = processes.my_part(self._next("all"))
        inputs = self.task.train.batch(rows)
        with torch.no_grad():
            teacher = self.teacher(inputs).softmax(dim=1)
        logits, features = self.averaged_model(inputs, features=True)
        torch.autograd.backward(share * cosine_loss(logits, features, teacher))

    def _clean_loss(self, rows: Tensor) -> Tensor:
        return F.cross_entropy(self.averaged_model(self.task.clean.batch(rows)), self.task.clean_labels[rows])

    def _meta_step(
        self, learners: MetaLearners, weak_loss: Callable[[], Tensor], weak_share: float, batch: Tensor
    ) -> None:
        """Move the meta learners so that the base step just made would have lowered the loss on the clean ``batch``."""
        rows, share = processes.my_part(batch)
        self.meta_optimizer.zero_grad()
        # The clean term of the base loss does not read the meta parameters: it is part of the base gradient, which is
        # still in .grad, but the perturbed passes can leave it out.
        sama = self.method.sama
        base_loss = (
            [self._weak_loss(rows) for rows, _ in self.recent] if self.method.algorithm == "iterative" else weak_loss
        )
        out = sk.meta_backward(
            base_loss,
            lambda: self._clean_loss(rows),
            base_params=self.model,
            meta_params=learners,
            optimizer=self.optimizer,
            alpha=self.settings.alpha,
            algorithm=self._algorithm(),
            sync=self.settings.sync if sama else "final",
            weight=(weak_share, share),
            # Where a stage on the clean labels follows, it does that job better (validation: 76.6 % against 75.7 %).
            update_base=sama and self.settings.update_base and not self.method.then_clean,
        )
        if self.method.learns:
            self.meta_optimizer.step()
        self.degenerate.append(out.degenerate)  # read after the run: asking now would wait for the device

    def _algorithm(self) -> str | Algorithm:
        """As many products with the Hessian, or steps, as the settings say."""
        terms, name = self.settings.inner_terms, self.method.algorithm
        assert name is not None
        chosen: dict[str, Algorithm] = {
            # From where theta is now, through steps on the batches since the last meta step.
            "iterative": Iterative(steps=max(1, len(self.recent)), per_step=True),
            "conjugate_gradient": ConjugateGradient(iterations=terms),
            "neumann": Neumann(terms=terms),
            "nystrom": Nystrom(rank=terms),
            "truncated": Truncated(steps=terms + 1),
        }
        return chosen.get(name, name)
