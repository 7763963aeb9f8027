"""The 4-layer convolutional network of MAML and iMAML on Omniglot, its width free."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .tasks import SIDE

LAYERS = 4


class ConvNet(nn.Module):
    """Four times convolution 3x3, normalisation, ReLU, with half of the height and width after each; a linear layer.

    As in MAML (Finn et al. 2017, section 5.2) and iMAML, on Omniglot the convolutions have stride 2 in the place of
    pooling (``downsample`` "stride"; a quarter of the work of "pool"), and normalisation is by the statistics of the
    batch at hand, in training and in test, without running averages: a buffer would carry something from task to task
    beside lambda. It makes query images see each other (transductive); ``norm`` "group" does not.
    """

    def __init__(self, width: int, ways: int, norm: str = "batch", downsample: str = "stride") -> None:
        super().__init__()
        layers: list[nn.Module] = []
        side = SIDE
        for layer in range(LAYERS):
            stride = 2 if downsample == "stride" else 1
            layers.append(nn.Conv2d(1 if layer == 0 else width, width, kernel_size=3, stride=stride, padding=1))
            layers.append(_normalisation(norm, width))
            layers.append(nn.ReLU())
            if downsample == "pool":
                layers.append(nn.MaxPool2d(2))
            side = (side + 1) // 2 if downsample == "stride" else side // 2
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(width * side * side, ways)
        with torch.no_grad():
            # Every class alike at first: which class has which number is drawn anew for each task.
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [B, 1, 28, 28] -> logits [B, ways]."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _normalisation(norm: str, width: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(width, track_running_stats=False)
    return nn.GroupNorm(1, width)  # one group: works for every width
