"""What the meta learners of section 4.1 see, learned data weights and learned label correction.

A net that sees only the loss cannot tell which weak labels are wrong: a wrong label that the lexicons agree on is as
easy to fit as a right one. So both nets also see what a person would look at: the votes and their agreement, the weak
label, and sentence features of the frozen encoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class ExampleEvidence:
    """What the meta learners know about each training text before any training.

    Attributes:
        features: float32 [N, H + S], standardised sentence features beside the labelling functions' signals.
        weak_targets: float32 [N, C], the weak label one-hot; uniform where there is none.
        covered: bool [N], whether there is a weak label.
    """

    def __init__(self, sentence: Tensor, signals: Tensor, weak_labels: Tensor, classes: int) -> None:
        self.covered = weak_labels >= 0
        one_hot = F.one_hot(weak_labels.clamp(min=0), classes).float()
        self.weak_targets = torch.where(self.covered.unsqueeze(1), one_hot, 1 / classes)
        # The H sentence features are many and each says little: at a third of unit size they do not drown the signals.
        standardised = (sentence - sentence.mean(dim=0)) / (sentence.std(dim=0) + 1e-6)
        self.features = torch.cat([standardised / 3, signals], dim=1)

    def of(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(features [B, H + S], weak targets [B, C], covered [B]) of the rows ``index``."""
        return self.features[index], self.weak_targets[index], self.covered[index]


START_GATE = 0.7310585786300049  # at the start so much of a corrected label is the prediction, which is still uniform
