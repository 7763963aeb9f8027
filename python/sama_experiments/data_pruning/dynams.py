"""DynaMS (Wang et al., 2023): the samples to train on are selected anew while the model is trained."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import ExperimentError
from .images import Dataset
from .methods import Settings
from .models import new_model
from .proxy import Proxy
from .scores import boundary_margin
from .training import Trainer


def falling_shares(epochs: int, warmup: int, every: int, mean: float) -> list[float]:
    """The share of the samples that each epoch trains on: 1 for ``warmup`` epochs, then q, q², ... for ``every`` each.

    q is such that their mean is ``mean``, so that the training sees as many samples as that of a static method.
    """
    if mean * epochs <= warmup:
        raise ExperimentError(
            f"--dynams-warmup {warmup}: with {1 - mean:g} pruned that uses up what {epochs} epochs may see; make it"
            " smaller"
        )
    powers = [0] * warmup + [1 + k // every for k in range(epochs - warmup)]
    low, high = 0.0, 1.0
    for _ in range(60):  # the mean grows with q: halve where it must be
        q = (low + high) / 2
        low, high = (q, high) if sum(q**power for power in powers) < mean * epochs else (low, q)
    return [high**power for power in powers]


class DynamsTraining(Trainer):
    """Training on all samples for some epochs, then on ever fewer: those nearest to the decision boundary.

    A proxy that shares the model's parameters is trained beside it and does the selecting (``dynams_proxy`` is its
    width; with 1 the model itself selects). From the paper are the margin, selecting anew while training, and the
    proxy that shares parameters. How wide it is, how it is trained and how the share falls are our own: the loss of the
    proxy is added to that of the model, as slimmable networks do, and see ``falling_shares``.
    """

    def __init__(self, data: Dataset, settings: Settings, seed: int, ratio: float) -> None:
        super().__init__(data, settings, seed, settings.epochs)
        self.shares = falling_shares(self.epochs, settings.dynams_warmup, settings.dynams_every, 1 - ratio)
        self.selection_seconds = 0.0  # of training the proxy and of looking at all samples
        self.proxy: Proxy | None = None
        if settings.dynams_proxy < 1:
            shape = (data.channels, data.size, data.classes)
            narrow = new_model(settings.model, *shape, width=settings.dynams_proxy)
            self.proxy = Proxy(self.model, narrow.to(data.train.labels.device).train())

    def run_epoch(self) -> None:
        """Select, where it is time to, and train."""
        if self.epoch > 0 and self.shares[self.epoch] < self.shares[self.epoch - 1]:
            before = self.seconds
            with self.clock():
                self._select()
            self.selection_seconds += self.seconds - before
        super().run_epoch()

    def backward(self, index: Tensor, share: float, images: Tensor) -> Tensor:
        """See ``Trainer``; the gradients of the proxy's loss come first, as long as it will be asked again."""
        if self.proxy is not None and self.shares[-1] < self.shares[self.epoch]:
            started = self.now()
            torch.autograd.backward(share * F.cross_entropy(self.proxy(images), self.data.train.labels[index]))
            self.selection_seconds += self.now() - started
        return super().backward(index, share, images)

    def state(self) -> dict[str, Any]:
        """Everything that changes, between two epochs."""
        statistics = [] if self.proxy is None else list(self.proxy.narrow.buffers())
        own = {"rows": self.rows, "selection_seconds": self.selection_seconds, "statistics": statistics}
        return super().state() | own

    def resume(self, state: dict[str, Any]) -> None:
        """Back to what ``state`` gave."""
        super().resume(state)
        self.rows, self.selection_seconds = state["rows"], state["selection_seconds"]
        if self.proxy is not None:
            for statistic, kept in zip(self.proxy.narrow.buffers(), state["statistics"], strict=True):
                statistic.copy_(kept)

    def _select(self) -> None:
        model = self.model if self.proxy is None else self.proxy.model()
        head = model.head.weight.detach()

        def margin(logits: Tensor, labels: Tensor, _: Tensor) -> Tensor:
            return boundary_margin(logits, labels, head)

        (scores,) = self.score(self.data.train, margin, model=model)
        order = scores.argsort(descending=True, stable=True)
        self.rows = order[: max(round(self.shares[self.epoch] * len(order)), 1)].sort().values
