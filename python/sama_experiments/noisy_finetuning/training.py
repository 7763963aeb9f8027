"""Training with one method: base steps on weak and clean batches, and a meta step after every few of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sama_kernels as sk

from ..common import processes
from ..common.batches import shuffled_batches
from ..common.encoder import EncodedTexts, TextClassifier
from ..common.errors import ExperimentError
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

        weak_rows = torch.arange(len(task.train_labels), device=task.train_labels.device)
        if not (settings.abstentions and method.corrects):
            weak_rows = weak_rows[task.evidence.covered]
        if len(weak_rows) == 0:
            raise ExperimentError("no training text has a weak label")
        beside_weak = method.weak and not method.then_clean
        clean_size = settings.clean_batch_size if beside_weak else settings.batch_size
        self.clean_in_base = method.clean or (method.meta and settings.clean_in_base)
        self.weak_batches = shuffled_batches(weak_rows, task.train.lengths, settings.batch_size, draws[0])
        self.clean_batches = shuffled_batches(task.clean_index, task.clean.lengths, clean_size, draws[1])
        self.meta_batches = shuffled_batches(task.clean_index, task.clean.lengths, settings.meta_batch_size, draws[2])
        processes.own_random_numbers(seed)

    def step(self) -> None:
        """One base step and, where the schedule says so, one meta step."""
        method, settings = self.method, self.settings
        if method.then_clean and self.step_count == self.weak_steps:
            self._begin_stage(settings.clean_steps)
        self.step_count += 1
        on_weak = method.weak and (self.step_count <= self.weak_steps or not method.then_clean)
        self.optimizer.zero_grad()
        if on_weak:
            rows, weak_share = processes.my_part(next(self.weak_batches))
            weak_loss = self._weak_loss(rows)
            torch.autograd.backward(weak_share * weak_loss())
        if self.clean_in_base or not on_weak:
            weight = settings.clean_weight if on_weak else 1.0
            rows, share = processes.my_part(next(self.clean_batches))
            torch.autograd.backward(weight * share * self._clean_loss(rows))
        self.optimizer.step()
        meta_due = on_weak and self.step_count > settings.meta_start and self.step_count % settings.unroll == 0
        if self.learners is not None and method.adaptation is not None and meta_due:
            self._meta_step(self.learners, method.adaptation, weak_loss, weak_share, next(self.meta_batches))
        self.scheduler.step()

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

    def _clean_loss(self, rows: Tensor) -> Tensor:
        return F.cross_entropy(self.averaged_model(self.task.clean.batch(rows)), self.task.clean_labels[rows])

    def _meta_step(
        self, learners: MetaLearners, adaptation: str, weak_loss: Callable[[], Tensor], weak_share: float, batch: Tensor
    ) -> None:
        """Move the meta learners so that the base step just made would have lowered the loss on the clean ``batch``."""
        rows, share = processes.my_part(batch)
        self.meta_optimizer.zero_grad()
        # The clean term of the base loss does not read the meta parameters: it is part of the base gradient, which is
        # still in .grad, but the perturbed passes can leave it out.
        out = sk.meta_backward(
            weak_loss,
            lambda: self._clean_loss(rows),
            base_params=self.model,
            meta_params=learners,
            optimizer=self.optimizer,
            alpha=self.settings.alpha,
            adaptation=adaptation,
            sync=self.settings.sync,
            weight=(weak_share, share),
            # Where a stage on the clean labels follows, it does that job better (validation: 76.6 % against 75.7 %).
            update_base=self.settings.update_base and not self.method.then_clean,
        )
        if self.method.learns:
            self.meta_optimizer.step()
        self.degenerate.append(out.degenerate)  # read after the run: asking now would wait for the device
