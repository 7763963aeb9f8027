"""What is known of every row: sums over the epochs while training goes on, and what the final model says.

In the last epoch a row is scored when training comes by it, before the step that uses it: that costs nothing more, and
the model has seen the row's label once less. What counts beside that is one pass of the final model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .learner import LARGEST_WEIGHT, Judgement


class Scores:
    """Tables with an entry for each of N rows, on the CPU: 24 bytes a row.

    Attributes:
        margin: float32, sum of p(best other label) - p(given label), of two readings.
        weight, loss, confidence: float32, of the final nets and model.
        proposed: int32, the class that the final model finds likeliest.
        corrected: int32, the likeliest class of the corrected label.
    """

    def __init__(self, rows: int) -> None:
        self.margin, self.weight, self.loss, self.confidence = (torch.zeros(rows) for _ in range(4))
        self.proposed, self.corrected = (torch.zeros(rows, dtype=torch.int32) for _ in range(2))

    def add(self, places: Tensor, judgement: Judgement, labels: Tensor) -> None:
        """Count what training found on the way; places: int64 [B], labels: int64 [B]."""
        self.margin[places] += margins(judgement.probabilities, labels).cpu()

    def finish(self, places: Tensor, judgement: Judgement, labels: Tensor) -> None:
        """What the final model says, which also counts once."""
        self.add(places, judgement, labels)
        confidence, proposed = judgement.probabilities.max(dim=1)
        self.weight[places] = judgement.weights.cpu()
        self.loss[places] = judgement.losses.cpu()
        self.confidence[places] = confidence.cpu()
        self.proposed[places] = proposed.int().cpu()
        self.corrected[places] = judgement.targets.argmax(dim=1).int().cpu()

    def suspicion(self) -> Tensor:
        """float32 [N] in [0, 1]: how much the model disagrees and how low the weight is, in equal parts.

        The former is (1 + mean margin) / 2, the latter 1 - weight / 2. Where all classes are as noisy as the others,
        either finds about as many wrong labels; where some classes are, the weights find more (docs/own_data.md).
        """
        disagreement = (1 + self.margin / 2) / 2
        return (disagreement + 1 - self.weight / LARGEST_WEIGHT) / 2

    def relative_weight(self) -> Tensor:
        """float32 [N], with a mean of 1: only the ratios of weights count."""
        return self.weight / self.weight.mean()

    def __len__(self) -> int:
        return len(self.margin)

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return vars(self)

    def load(self, state: dict[str, Any]) -> None:
        """Back to what ``state`` gave."""
        vars(self).update(state)


def margins(probabilities: Tensor, labels: Tensor) -> Tensor:
    """p(best other label) - p(given label), from [B, C] and int64 [B]: [B] in [-1, 1]."""
    own = labels.unsqueeze(1)
    given = probabilities.gather(1, own).squeeze(1)
    return probabilities.scatter(1, own, -1.0).amax(dim=1) - given
