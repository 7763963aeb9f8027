"""Image classifiers in plain torch: a small CNN, and the ResNets of He et al. (2016) that the paper uses.

Each is a ``Classifier``: features from the images, and a linear layer on top, which GraNd and DynaMS look into.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MODELS = ("cnn", "resnet18", "resnet50")


class Classifier(nn.Module):
    """A feature extractor and a linear layer."""

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """images, float32 [B, C, H, W] -> logits [B, K]."""
        logits: Tensor = self.head(self.body(images))
        return logits


def new_model(name: str, channels: int, size: int, classes: int, width: float = 1.0) -> Classifier:
    """A model with fresh parameters, drawn from torch's global generator, for square images of ``size`` pixels.

    The ResNets keep the resolution at first where images are small (as is usual for CIFAR-10). ``width`` is the share
    of the usual channels that every layer has.
    """
    narrowest = max(round(64 * width), 4)  # the other widths are multiples or parts of it
    if name == "cnn":
        return Classifier(_small_cnn(channels, size, narrowest), narrowest, classes)
    small = size < 64
    if name == "resnet18":
        return Classifier(_resnet(_BasicBlock, (2, 2, 2, 2), channels, small, narrowest), 8 * narrowest, classes)
    return Classifier(_resnet(_Bottleneck, (3, 4, 6, 3), channels, small, narrowest), 32 * narrowest, classes)


def _small_cnn(channels: int, size: int, width: int) -> nn.Sequential:
    left = -(-size // 4)  # two strides of 2
    return nn.Sequential(
        nn.Conv2d(channels, width // 4, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(width // 4, width // 2, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(width // 2 * left * left, width), nn.ReLU(),
    )  # fmt: skip


class _Block(nn.Module):
    """A residual block: ``relu(residual(x) + shortcut(x))``, the shortcut projecting where the shape changes."""

    def __init__(self, residual: nn.Sequential, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = residual
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))


class _BasicBlock(_Block):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        layers = [*_conv(inputs, width, 3, stride), nn.ReLU(), *_conv(width, width, 3, 1)]
        super().__init__(nn.Sequential(*layers), inputs, width, stride)


class _Bottleneck(_Block):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        layers = [*_conv(inputs, width, 1, 1), nn.ReLU(), *_conv(width, width, 3, stride), nn.ReLU()]
        layers += _conv(width, 4 * width, 1, 1)
        super().__init__(nn.Sequential(*layers), inputs, 4 * width, stride)


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(outputs)]


def _resnet(
    block: type[_BasicBlock | _Bottleneck], depths: tuple[int, ...], channels: int, small: bool, narrowest: int
) -> nn.Module:
    stem = _conv(channels, narrowest, 3, 1) if small else _conv(channels, narrowest, 7, 2)
    layers: list[nn.Module] = [*stem, nn.ReLU()]
    if not small:
        layers.append(nn.MaxPool2d(3, stride=2, padding=1))
    inputs = narrowest
    for stage, depth in enumerate(depths):
        width = narrowest * 2**stage
        for place in range(depth):
            layers.append(block(inputs, width, 2 if stage > 0 and place == 0 else 1))
            inputs = block.expansion * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
