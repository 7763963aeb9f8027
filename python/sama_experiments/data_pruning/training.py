"""Training one classifier, epoch by epoch, in a way that can be broken off after each and resumed.

Several processes take a part of every batch each, and are the same experiment as one (but for the statistics of batch
normalisation, which are those of the parts).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import processes
from .images import Dataset, Images, read, seeded, shuffled_batches
from .methods import Settings
from .models import Classifier, new_model
from .scores import Forgetting

SCORING_BATCH = 500
Formula = Callable[[Tensor, Tensor, Tensor], Tensor]


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
        self.averaging_model = processes.averaging(self.model)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )

    def run_epoch(self) -> None:
        """Train on every sample once."""
        with self.clock():
            batches = self.batches()
            for place, (index, share, images) in enumerate(self.read(batches)):
                self._set_rate((self.epoch + place / len(batches)) / self.settings.epochs)
                self.optimizer.zero_grad()
                logits = self.backward(index, share, images)
                self.optimizer.step()
                self.after_step(index, logits)
        self.epoch += 1

    def backward(self, index: Tensor, share: float, images: Tensor) -> Tensor:
        """Add the gradients of the loss of (this process's part of) a batch; gives the logits [B, K]."""
        logits: Tensor = self.averaging_model(images)
        torch.autograd.backward(share * F.cross_entropy(logits, self.data.train.labels[index]))
        return logits.detach()

    def after_step(self, index: Tensor, logits: Tensor) -> None:
        """Told the samples of (this process's part of) each batch, int64 [B], and the logits [B, K] of its step."""

    def batches(self, stream: int = 0) -> list[Tensor]:
        """The samples of an epoch in a random order; each ``stream`` has an order of its own."""
        return shuffled_batches(self.rows, self.settings.batch_size, seeded(self.seed, self.epoch, stream))

    def read(self, batches: list[Tensor], stream: int = 0) -> Iterator[tuple[Tensor, float, Tensor]]:
        """Of this process's part of each batch: (indices, factor of the mean loss over it, augmented images)."""
        parts = [processes.my_part(batch) for batch in batches]
        own = processes.rank()
        draws = [seeded(self.seed, self.epoch, stream, place, own) for place in range(len(batches))]
        found = read(self.data.train, [part for part, _ in parts], draws)
        for (index, images), (_, share) in zip(found, parts, strict=True):
            yield index, share, images

    @contextmanager
    def clock(self) -> Iterator[None]:
        """A block whose time is added to ``seconds``."""
        started = self.now()
        yield
        self.seconds += self.now() - started

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
    def score(self, images: Images, *formulas: Formula, model: Classifier | None = None) -> list[Tensor]:
        """Scores of all images by what ``model`` (the trained one) makes of them as in a test, each float32 [N], on the
        CPU.

        A formula is told logits [B, K], labels [B] and what the last layer reads, [B, H]. Processes divide the batches.
        """
        model = self.model if model is None else model
        found = torch.zeros(len(formulas), len(images.labels))
        batches = torch.split(torch.arange(len(images.labels)), SCORING_BATCH)
        mine = [index for place, index in enumerate(batches) if processes.is_mine(place)]
        model.eval()
        for index, batch in read(images, mine, [None] * len(mine)):
            features = model.body(batch)
            logits, labels = model.head(features), images.labels[index]
            for scores, formula in zip(found, formulas, strict=True):
                scores[index] = formula(logits, labels, features).float().cpu()
        model.train()
        processes.sum_in_place(found)
        return list(found)

    def accuracy(self) -> float:
        """Share of the scored images that the model puts into the right class."""
        (right,) = self.score(self.data.scored, lambda logits, labels, _: logits.argmax(dim=1) == labels)
        return right.double().mean().item()

    def _set_rate(self, progress: float) -> None:
        """The learning rate after this share of the training."""
        factor = 0.5 * (1 + math.cos(math.pi * progress))
        if self.settings.schedule == "steps":  # as in DynaMS for ImageNet: after 40 and 80 of 120 epochs
            factor = 0.1 ** int(3 * progress + 1e-9)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.settings.lr

    def now(self) -> float:
        """Seconds on a clock; the device has done what it was given."""
        if self.data.train.labels.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class FullTraining(Trainer):
    """Training on all samples, which also counts how often each is forgotten."""

    def __init__(self, data: Dataset, settings: Settings, seed: int) -> None:
        super().__init__(data, settings, seed, settings.epochs)
        self.forgetting = Forgetting(len(data.train.labels))
        self._right = torch.zeros_like(data.train.labels)

    def run_epoch(self) -> None:
        """Train on every sample once, and note which are right."""
        self._right.zero_()
        super().run_epoch()
        processes.sum_in_place(self._right)  # each sample was seen by one process
        self.forgetting.see(self.rows, (self._right > 0).cpu())

    def after_step(self, index: Tensor, logits: Tensor) -> None:
        """See ``Trainer``."""
        self._right[index] = (logits.argmax(dim=1) == self.data.train.labels[index]).long()

    def state(self) -> dict[str, Any]:
        """Everything that changes, between two epochs."""
        return super().state() | {"forgetting": vars(self.forgetting)}

    def resume(self, state: dict[str, Any]) -> None:
        """Back to what ``state`` gave."""
        super().resume(state)
        vars(self.forgetting).update(state["forgetting"])
