"""DynaMS (Wang et al., 2023): the samples to train on are selected anew while the model is trained."""

from __future__ import annotations

from typing import Any

from ..common.errors import ExperimentError
from .images import Dataset
from .methods import Settings
from .scores import boundary_margin
from .training import Trainer


class DynamsTraining(Trainer):
    """Training on all samples for some epochs, then on those nearest to the model's decision boundary.

    So many are kept that the whole training sees as many samples as that of a static method which prunes ``ratio``. The
    original lets the kept share fall epoch by epoch, and selects with a smaller proxy model; here the share is constant
    after the warm-up, and the model selects by itself.
    """

    def __init__(self, data: Dataset, settings: Settings, seed: int, ratio: float) -> None:
        super().__init__(data, settings, seed, settings.epochs)
        warmup = settings.dynams_warmup
        self.selection_seconds = 0.0
        self.kept_share = ((1 - ratio) * self.epochs - warmup) / max(self.epochs - warmup, 1)
        if self.kept_share <= 0:
            raise ExperimentError(
                f"--dynams-warmup {warmup}: with {ratio:g} pruned nothing is left of {self.epochs} epochs after it"
            )

    def run_epoch(self) -> None:
        """Select, where it is time to, and train."""
        since = self.epoch - self.settings.dynams_warmup
        if since >= 0 and since % self.settings.dynams_every == 0:
            self._select()
        super().run_epoch()

    def state(self) -> dict[str, Any]:
        """Everything that changes, between two epochs."""
        return super().state() | {"rows": self.rows, "selection_seconds": self.selection_seconds}

    def resume(self, state: dict[str, Any]) -> None:
        """Back to what ``state`` gave."""
        super().resume(state)
        self.rows, self.selection_seconds = state["rows"], state["selection_seconds"]

    def _select(self) -> None:
        before = self.seconds
        with self.clock():
            head = self.model.head.weight.detach()
            (scores,) = self.score(self.data.train, lambda logits, labels, _: boundary_margin(logits, labels, head))
            order = scores.argsort(descending=True, stable=True)
            self.rows = order[: max(round(self.kept_share * len(order)), 1)].sort().values
        self.selection_seconds += self.seconds - before
