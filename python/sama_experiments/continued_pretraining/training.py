"""Training with one method: base steps on labelled and auxiliary texts, and a meta step after every few of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sama_kernels as sk

from ..common.batches import shuffled_batches
from ..common.checkpoints import random_state, set_random_state
from ..common.encoder import EncodedTexts
from .masking import MaskedBatch, MaskedCorpus
from .methods import Method, Settings
from .model import MultitaskModel


@dataclass(frozen=True)
class LabelledRows:
    """Encoded texts, their classes (int64 [N]), and the rows that count (int64 [K])."""

    texts: EncodedTexts
    labels: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Task:
    """What one seed trains and scores on; all tensors are on the training device.

    ``evidence`` is what is known of the corpus's texts besides their losses, float32 [R, E] by name.
    """

    train: LabelledRows
    dev: LabelledRows | None
    scored: LabelledRows
    corpus: MaskedCorpus
    evidence: dict[str, Tensor]
    steps: int
    new_model: Callable[[], MultitaskModel]


class TextWeights(nn.Module):
    """The weight of an auxiliary text: a net over its loss and, where given, other evidence (float32 [R, E])."""

    def __init__(self, evidence: Tensor | None, hidden: int, mean_one: bool) -> None:
        super().__init__()
        self._evidence = evidence
        self._mean_one = mean_one
        self.net = sk.nn.MetaWeightNet(0 if evidence is None else evidence.shape[1], hidden)

    def forward(self, losses: Tensor, rows: Tensor) -> Tensor:
        """Held losses [B] of the texts ``rows`` (int64 [B]) -> weights [B], all 1 at the start."""
        weights: Tensor = self.net(losses, None if self._evidence is None else self._evidence[rows])
        return weights / weights.mean() if self._mean_one else weights


class Trainer:
    """A fresh model (and weight net) and everything that one training step needs."""

    def __init__(self, task: Task, method: Method, settings: Settings, seed: int) -> None:
        torch.manual_seed(seed)
        self.task = task
        self.method = method
        self.settings = settings
        self.seed = seed
        self.steps = task.steps * (2 if method.pretrains else 1)
        self.step_count = 0
        self.degenerate: list[Tensor] = []
        self.model = task.new_model().train()
        self._begin_stage()
        self.weigh: TextWeights | None = None
        if method.meta:
            self.weigh = TextWeights(task.evidence.get(method.sees), settings.meta_hidden, settings.mean_one)
            self.weigh.to(task.train.labels.device)
            self.meta_optimizer = torch.optim.Adam(self.weigh.parameters(), lr=settings.meta_lr)
        # One generator for each stream of batches: every method then sees the same batches in the same order.
        draws = [torch.Generator().manual_seed(3 * seed + stream) for stream in range(3)]
        corpus = task.corpus
        rows = torch.arange(len(corpus.lengths), device=corpus.lengths.device)
        if method.own_texts_only:
            rows = rows[corpus.domain == 0]
        self.train_batches = _batches(task.train, settings.batch_size, draws[0])
        self.auxiliary_batches = shuffled_batches(rows, corpus.lengths, settings.auxiliary_batch_size, draws[1])
        self.meta_texts = task.train
        if method.meta_on == "dev":
            if task.dev is None:
                raise ValueError(f"{method.key} needs the dev split")
            self.meta_texts = task.dev
        self.meta_batches = _batches(self.meta_texts, settings.meta_batch_size, draws[2])

    def step(self) -> None:
        """One base step and, where the schedule says so, one meta step."""
        settings = self.settings
        if self.method.pretrains and self.step_count == self.task.steps:
            self._begin_stage()
        pretraining = self.method.pretrains and self.step_count < self.task.steps
        self.step_count += 1
        self.optimizer.zero_grad()
        if pretraining or self.method.multitask:
            auxiliary_loss = self._auxiliary_loss(self._next_auxiliary())
            torch.autograd.backward(auxiliary_loss())
        if not pretraining:
            torch.autograd.backward(self._downstream_loss(self.task.train, next(self.train_batches)))
        self.optimizer.step()
        if self.weigh is not None and self._meta_step_due():
            batch = next(self.meta_batches)
            self.meta_optimizer.zero_grad()
            # The downstream part of the base loss does not read the meta parameters: it is part of the base gradient,
            # which is still in .grad, but the perturbed passes can leave it out.
            out = sk.meta_backward(
                auxiliary_loss,
                lambda: self._downstream_loss(self.meta_texts, batch),
                base_params=self.model,
                meta_params=self.weigh,
                optimizer=self.optimizer,
                alpha=settings.alpha,
                adaptation=str(self.method.adaptation),
                update_base=settings.update_base,
            )
            self.meta_optimizer.step()
            self.degenerate.append(out.degenerate)  # read after the run: asking now would wait for the device
        self.scheduler.step()

    def state(self) -> dict[str, Any]:
        """All that ``resume`` needs to go on from here."""
        meta = None
        if self.weigh is not None:
            meta = {"net": self.weigh.state_dict(), "optimizer": self.meta_optimizer.state_dict()}
        return {
            "step": self.step_count,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "kept": sk.state_dict(self.optimizer),
            "scheduler": self.scheduler.state_dict(),
            "meta": meta,
            "degenerate": [bool(flag) for flag in self.degenerate],
            "random": random_state(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` gave; for a trainer that has made no step."""
        for _ in range(state["step"]):  # the streams of batches have no state of their own: draw what was drawn
            pretraining = self.method.pretrains and self.step_count < self.task.steps
            self.step_count += 1
            if pretraining or self.method.multitask:
                next(self.auxiliary_batches)
            if not pretraining:
                next(self.train_batches)
            if self.weigh is not None and self._meta_step_due():
                next(self.meta_batches)
        self.model.load_state_dict(state["model"])
        if self.method.pretrains and self.step_count > self.task.steps:
            self._begin_stage()
        self.optimizer.load_state_dict(state["optimizer"])
        sk.load_state_dict(self.optimizer, state["kept"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.weigh is not None:
            self.weigh.load_state_dict(state["meta"]["net"])
            self.meta_optimizer.load_state_dict(state["meta"]["optimizer"])
        self.degenerate = [torch.tensor(flag) for flag in state["degenerate"]]
        set_random_state(state["random"])

    def _begin_stage(self) -> None:
        """A fresh optimizer, and the learning rate's way up and down over the downstream steps (paper, Table 5)."""
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.settings.base_lr)
        warmup = max(round(self.settings.warmup * self.task.steps), 1)

        def rate(step: int) -> float:
            return min((step + 1) / warmup, (self.task.steps - step) / max(self.task.steps - warmup, 1))

        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)

    def _meta_step_due(self) -> bool:
        return self.step_count > self.settings.meta_start and self.step_count % self.settings.unroll == 0

    def _next_auxiliary(self) -> MaskedBatch:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.step_count)
        return self.task.corpus.batch(next(self.auxiliary_batches), generator)

    def _auxiliary_loss(self, batch: MaskedBatch) -> Callable[[], Tensor]:
        """The weighted masked-language-model loss as a closure, for the base step and the perturbed passes alike."""

        @sk.recorded  # keeps the held losses of the base step, which saves the meta step a forward pass
        def auxiliary_loss() -> Tensor:
            losses = self.model.masked_losses(batch.inputs, batch.targets)
            if self.weigh is not None:
                # The weights are functions of the loss, but the base gradient does not flow through them.
                losses = self.weigh(sk.stop_gradient(losses), batch.rows) * losses
            return self.settings.auxiliary_weight * losses.mean()

        return auxiliary_loss

    def _downstream_loss(self, labelled: LabelledRows, batch: Tensor) -> Tensor:
        return F.cross_entropy(self.model(labelled.texts.batch(batch)), labelled.labels[batch])


def _batches(labelled: LabelledRows, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    return shuffled_batches(labelled.rows, labelled.texts.lengths, size, generator)
