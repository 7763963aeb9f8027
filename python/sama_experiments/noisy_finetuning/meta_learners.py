"""The meta learners of section 4.1: learned data weights and learned label correction.

A net that sees only the loss cannot tell which weak labels are wrong: a wrong label that the lexicons agree on is as
easy to fit as a right one. So both nets also see what a person would look at: the votes and their agreement, the weak
label, and sentence features of the frozen encoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


START_GATE = 1.0  # logit: at the start 73 % of a corrected label is the prediction, which is still uniform


def _two_layers(inputs: int, hidden: int, start: list[float]) -> nn.Sequential:
    """A 2-layer MLP (Table 4) that puts out ``start`` at first, so that no sample is favoured before a meta step."""
    last = nn.Linear(hidden, len(start))
    nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias.copy_(torch.tensor(start))
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), last)


class WeightNet(nn.Module):
    """Meta-Weight-Net (Shu et al. 2019) with more inputs than the loss: the weight of each sample, between 0 and 2."""

    def __init__(self, features: int, classes: int, hidden: int) -> None:
        super().__init__()
        self.net = _two_layers(1 + features + classes, hidden, [0.0])

    def forward(self, losses: Tensor, features: Tensor, weak_targets: Tensor) -> Tensor:
        """losses [B] (held), features [B, F], weak targets [B, C] -> weights [B], all 1 at the start."""
        output: Tensor = self.net(torch.cat([losses.unsqueeze(1), features, weak_targets], dim=1))
        return 2 * output.squeeze(1).sigmoid()


class LabelCorrector(nn.Module):
    """Corrected label = (1 - gate) * weak label + gate * the net's own prediction (after Zheng et al. 2021)."""

    def __init__(self, features: int, classes: int, hidden: int) -> None:
        super().__init__()
        self.classes = classes
        self.net = _two_layers(features + classes, hidden, [0.0] * classes + [START_GATE])

    def forward(self, features: Tensor, weak_targets: Tensor, covered: Tensor) -> Tensor:
        """features [B, F], weak targets [B, C], covered [B] -> corrected label distribution [B, C].

        Where there is no weak label, the label is the prediction alone.
        """
        output = self.net(torch.cat([features, weak_targets], dim=1))
        gate = torch.where(covered, output[:, self.classes].sigmoid(), 1.0).unsqueeze(1)
        return torch.lerp(weak_targets, output[:, : self.classes].softmax(dim=1), gate)
