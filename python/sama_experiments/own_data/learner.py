"""A text classifier and the nets that learn what each row is worth, guided by the clean set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sama_kernels as sk

from ..common.batches import shuffled_batches
from ..common.checkpoints import random_state, set_random_state
from ..common.encoder import EncodedTexts, PretrainedEncoder
from .index import CleanSet
from .options import Settings

LARGEST_WEIGHT = 2.0  # all weights are half of it at first
LARGEST_OF_OWN_LABEL = 1.0  # likewise


@dataclass(frozen=True)
class Batch:
    """B encoded rows and their labels, int64 [B]."""

    encoded: EncodedTexts
    labels: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """The classifier's input."""
        return self.encoded.batch(torch.arange(len(self.labels), device=self.labels.device))


@dataclass(frozen=True)
class Judgement:
    """What classifier and meta learners make of B rows.

    Attributes:
        probabilities: float32 [B, C], the classifier's.
        losses: float32 [B], cross entropy of the given labels.
        weights: float32 [B], of the given labels.
        totals: float32 [B], with those of the classifier's own labels, where labels are corrected.
        targets: float32 [B, C], the corrected labels; one-hot where nothing is corrected.
    """

    probabilities: Tensor
    losses: Tensor
    weights: Tensor
    totals: Tensor
    targets: Tensor

    def detached(self) -> Judgement:
        """The same without the graphs behind the weights and the targets."""
        return Judgement(*(value.detach() for value in vars(self).values()))


class MetaLearners(nn.Module):
    """Two nets that see the held loss of the given label, and that label, since classes may be mislabelled more or less
    often: one for the weight of the given label (paper, Tables 4 and 6) and, on request, one for the weight of the
    label that the classifier itself finds likeliest at that time.

    The label that is trained on is their mean, so weighted. (After "Learning to purify noisy labels via meta soft label
    corrector", Wu et al., 2021. A net that predicts labels by itself, as in section 4.1, needs more steps than a few
    epochs of a small set have: after 48 meta steps on 1,000 rows its predictions were right for 21 % of them, of six
    classes.)
    """

    def __init__(self, classes: int, hidden: int, corrects: bool) -> None:
        super().__init__()
        self.classes = classes
        self.weight_net = sk.nn.MetaWeightNet(classes, hidden, LARGEST_WEIGHT)
        self.own_label_net = sk.nn.MetaWeightNet(classes, hidden, LARGEST_OF_OWN_LABEL) if corrects else None

    def forward(self, logits: Tensor, labels: Tensor, correct: bool) -> Judgement:
        """Held logits [B, C], labels [B]; ``correct``: use the second net, if there is one."""
        given = F.one_hot(labels, self.classes).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        weights = self.weight_net(losses, given)
        totals, targets = weights, given
        if self.own_label_net is not None and correct:
            own = self.own_label_net(losses, given)
            totals = weights + own
            likeliest = F.one_hot(logits.argmax(dim=1), self.classes).float()
            targets = torch.lerp(given, likeliest, (own / totals).unsqueeze(1))
        return Judgement(logits.softmax(dim=1), losses, weights, totals, targets)

    @torch.no_grad()
    def center(self, losses: Tensor, labels: Tensor) -> None:
        """Shift the weight net's output so that the weights of these rows are about half of the largest on average.

        Nothing that is learned holds their common size, since only ratios count: without this all of them drift to 0 or
        to the largest, where ratios end.
        """
        weights = self.weight_net(losses, F.one_hot(labels, self.classes).float())
        last = self.weight_net.net[-1]
        assert isinstance(last, nn.Linear)
        last.bias.sub_(torch.logit(weights.mean() / LARGEST_WEIGHT, eps=1e-6))


class Learner:
    """Everything that one training step needs; ``state`` and ``load`` are for resuming."""

    def __init__(self, encoder: PretrainedEncoder, clean: CleanSet, settings: Settings, steps: int) -> None:
        torch.manual_seed(settings.seed)
        self.encoder = encoder
        self.settings = settings
        self.classes = len(clean.classes)
        self.step_count = 0
        self.clean = encoder.encode(clean.texts)
        self.clean_labels = clean.labels.to(encoder.device)
        self.model = encoder.classifier(self.classes, settings.pooling).train()
        self.learners = MetaLearners(self.classes, settings.meta_hidden, settings.correct)
        self.learners.to(encoder.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.lr)
        self.meta_optimizer = torch.optim.Adam(self.learners.parameters(), lr=settings.meta_lr)
        self.steps = steps
        # Meta learning, and with it label correction, begins after the first epoch, or after half of it where there is
        # no other. Before, rows with a large loss teach most, whatever their label, and the net would learn that.
        self.meta_after = steps // max(2, settings.epochs)
        self.meta_batches = self._meta_batches()

    def batch(self, texts: list[str], labels: Tensor) -> Batch:
        """Encode rows; labels: int32 [B]."""
        encoded = self.encoder.encode(texts, check_cut=False)
        return Batch(encoded, labels.long().to(self.encoder.device))

    def clean_batch(self, places: Tensor) -> Batch:
        """Clean rows; places: int64 [B]."""
        index = places.to(self.encoder.device)
        return Batch(self.clean.rows(index), self.clean_labels[index])

    def step(self, batch: Batch) -> Judgement:
        """One base step and, where the schedule says so, one meta step; what was made of the rows before both."""
        self.step_count += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * self._rate()
        seen: list[Judgement] = []

        @sk.recorded  # keeps the held logits of the base step, which saves the meta step a forward pass
        def base_loss() -> Tensor:
            logits = self.model(batch.inputs())
            held = sk.stop_gradient(logits)
            judgement = self._judge(held, batch)
            seen.append(judgement)
            losses = F.cross_entropy(logits, judgement.targets, reduction="none")
            # Of the weights only their ratios count (as in Meta-Weight-Net): else the meta gradient would mostly move
            # all of them together, which is no more than a change of the learning rate.
            weighted: Tensor = (judgement.totals * losses).sum() / judgement.totals.sum()
            return weighted

        self.optimizer.zero_grad()
        torch.autograd.backward(base_loss())
        self.optimizer.step()
        if self._meta_due():
            self._meta_step(base_loss, batch, seen[0].losses)
        return seen[0].detached()

    @torch.no_grad()
    def judge(self, batch: Batch) -> Judgement:
        """What is made of the rows now, with dropout off."""
        self.model.eval()
        judgement = self._judge(self.model(batch.inputs()), batch)
        self.model.train()
        return judgement

    def state(self) -> dict[str, Any]:
        """All that changes in training."""
        return {
            "step": self.step_count,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "learners": self.learners.state_dict(),
            "meta_optimizer": self.meta_optimizer.state_dict(),
            "random": random_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Back to what ``state`` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.learners.load_state_dict(state["learners"])
        self.meta_optimizer.load_state_dict(state["meta_optimizer"])
        set_random_state(state["random"])
        self.meta_batches = self._meta_batches()
        for self.step_count in range(1, state["step"] + 1):
            if self._meta_due():
                next(self.meta_batches)
        self.step_count = state["step"]

    def _judge(self, logits: Tensor, batch: Batch) -> Judgement:
        judgement: Judgement = self.learners(logits, batch.labels, self.step_count > self.meta_after)
        return judgement

    def _meta_step(self, base_loss: Callable[[], Tensor], batch: Batch, losses: Tensor) -> None:
        """Move the meta learners so that the base step just made would have lowered the loss on clean rows."""
        rows = next(self.meta_batches)
        self.meta_optimizer.zero_grad()
        sk.meta_backward(
            base_loss,
            lambda: F.cross_entropy(self.model(self.clean.batch(rows)), self.clean_labels[rows]),
            base_params=self.model,
            meta_params=self.learners,
            optimizer=self.optimizer,
            alpha=sk.relative(self.settings.alpha),
        )
        for parameter in self.learners.parameters():
            # SAMA's D holds the learning rate: without this the schedule would fade the meta gradient out.
            assert parameter.grad is not None
            parameter.grad /= self._rate()
        self.meta_optimizer.step()
        self.learners.center(losses, batch.labels)

    def _meta_due(self) -> bool:
        return self.step_count > self.meta_after and self.step_count % self.settings.unroll == 0

    def _meta_batches(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.settings.seed)
        index = torch.arange(len(self.clean_labels), device=self.encoder.device)
        return shuffled_batches(index, self.clean.lengths, self.settings.meta_batch, generator)

    def _rate(self) -> float:
        """Warm-up over the first tenth of the steps, then a cosine to 0."""
        warm = min(1.0, self.step_count / max(1.0, self.settings.warmup * self.steps))
        return warm * 0.5 * (1 + math.cos(math.pi * (self.step_count - 1) / self.steps))
