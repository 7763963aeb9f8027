"""Training one classifier, epoch by epoch, in a way that can be broken off after each and resumed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import Dataset, Images, in_order, read, seeded, shuffled_batches
from .methods import Settings
from .models import Classifier, new_model
from .scores import Forgetting

SCORING_BATCH = 500


@dataclass(frozen=True)
class Outputs:
    """What a model makes of all images, as in a test: logits [N, K] and what the last layer reads, [N, H]."""

    logits: Tensor
    features: Tensor


class Trainer:
    """A fresh classifier with its optimizer. The seed says all: initial parameters, order of batches, augmentation.

    Args:
        data, settings: what to train on, and how.
        seed: see above.
        epochs: after which the training ends; the learning rate falls over those of a full training.
        rows: the training samples that are used, int64; all by default.
    """

    def __init__(self, data: Dataset, settings: Settings, seed: int, epochs: int, rows: Tensor | None = None) -> None:
        torch.manual_seed(seed)
        self.data = data
        self.settings = settings
        self.seed = seed
        self.epochs = epochs
        self.rows = torch.arange(len(data.train.labels)) if rows is None else rows
        self.epoch = 0
        self.seconds = 0.0
        device = data.train.labels.device
        self.model: Classifier = new_model(settings.model, data.channels, data.size, data.classes).to(device).train()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )

    def run_epoch(self) -> None:
        """Train on every sample once."""
        with self.clock():
            batches = self.batches()
            for place, (index, images) in enumerate(self.read(batches)):
                self._set_rate((self.epoch + place / len(batches)) / self.settings.epochs)
                self.optimizer.zero_grad()
                logits = self.model(images)
                torch.autograd.backward(F.cross_entropy(logits, self.data.train.labels[index]))
                self.optimizer.step()
                self.after_step(index, logits.detach())
        self.epoch += 1

    def after_step(self, index: Tensor, logits: Tensor) -> None:
        """Told the samples of each batch, int64 [B], and the logits [B, K] that its step was made with."""

    def batches(self, stream: int = 0) -> list[Tensor]:
        """The samples of an epoch in a random order; each ``stream`` has an order of its own."""
        return shuffled_batches(self.rows, self.settings.batch_size, seeded(self.seed, self.epoch, stream))

    def read(self, batches: list[Tensor], stream: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(indices, augmented images) of each batch."""
        draws = [seeded(self.seed, self.epoch, stream, place) for place in range(len(batches))]
        return read(self.data.train, batches, draws)

    @contextmanager
    def clock(self) -> Iterator[None]:
        """A block whose time is added to ``seconds``."""
        started = self._now()
        yield
        self.seconds += self._now() - started

    def state(self) -> dict[str, Any]:
        """Everything that changes, between two epochs."""
        return {
            "epoch": self.epoch,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Back to what ``state`` gave."""
        self.epoch, self.seconds = state["epoch"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def outputs(self, images: Images) -> Outputs:
        """What the model makes of all images, with running statistics in batch normalisation."""
        self.model.eval()
        features = torch.cat([self.model.body(batch) for _, batch in in_order(images, SCORING_BATCH)])
        self.model.train()
        return Outputs(self.model.head(features), features)

    def accuracy(self) -> float:
        """Share of the scored images that the model puts into the right class."""
        found = self.outputs(self.data.scored).logits.argmax(dim=1)
        return (found == self.data.scored.labels).double().mean().item()

    def _set_rate(self, progress: float) -> None:
        """The learning rate after this share of the training."""
        factor = 0.5 * (1 + math.cos(math.pi * progress))
        if self.settings.schedule == "steps":  # as in DynaMS for ImageNet: after 40 and 80 of 120 epochs
            factor = 0.1 ** int(3 * progress + 1e-9)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.settings.lr

    def _now(self) -> float:
        if self.data.train.labels.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class FullTraining(Trainer):
    """Training on all samples, which also counts how often each is forgotten."""

    def __init__(self, data: Dataset, settings: Settings, seed: int) -> None:
        super().__init__(data, settings, seed, settings.epochs)
        self.forgetting = Forgetting(len(data.train.labels))

    def after_step(self, index: Tensor, logits: Tensor) -> None:
        """See ``Trainer``."""
        right = logits.argmax(dim=1) == self.data.train.labels[index]
        self.forgetting.see(index, right.cpu())

    def state(self) -> dict[str, Any]:
        """Everything that changes, between two epochs."""
        return super().state() | {"forgetting": vars(self.forgetting)}

    def resume(self, state: dict[str, Any]) -> None:
        """Back to what ``state`` gave."""
        super().resume(state)
        vars(self.forgetting).update(state["forgetting"])
