"""What the training loop reads: images by index, in batches, with the usual random crops and flips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Images(Protocol):
    """N images with labels.

    Attributes:
        labels: int64 [N], on the training device.
        slow: whether a batch takes so long that it is worth reading the next one in another thread.
    """

    labels: Tensor
    slow: bool

    def batch(self, index: Tensor, draws: torch.Generator | None) -> Tensor:
        """The images ``index`` (int64 [B], on the CPU), float32 [B, C, H, W] on the training device; augmented by what
        ``draws`` gives, or as they are in a test."""


@dataclass(frozen=True)
class Truth:
    """What is known of the training samples because it was injected.

    Attributes:
        wrong: bool [N], whether the label is a wrong one.
        twin: int64 [N], the sample that this one was copied from or to; -1 for samples without a copy.
        copy: bool [N], whether the sample is the copy of the two.
    """

    wrong: Tensor
    twin: Tensor
    copy: Tensor


@dataclass(frozen=True)
class Dataset:
    """Training images and those to score on; square ones of ``size`` pixels."""

    name: str
    train: Images
    scored: Images
    classes: int
    channels: int
    size: int
    truth: Truth | None = None


class InMemoryImages:
    """Images that fit into memory.

    Args:
        pixels: uint8 [N, C, H, W].
        labels: int64 [N].
        mean, std: of each channel, of pixels between 0 and 1.
        augment: random crops of the image padded by 4 pixels, and flips, as is usual for CIFAR-10.
        device: where batches go.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, mean: Tensor, std: Tensor, augment: bool, device: torch.device
    ) -> None:
        self.slow = False
        self.pixels = pixels.to(device)
        self.labels = labels.to(device)
        self.augment = augment
        self._mean, self._std = (value.view(1, -1, 1, 1).to(device) for value in (mean, std))

    def batch(self, index: Tensor, draws: torch.Generator | None) -> Tensor:
        """See ``Images``."""
        chosen = self.pixels[index.to(self.pixels.device)]
        if self.augment and draws is not None:
            chosen = crop_and_flip(chosen, draws)
        return (chosen.float() / 255 - self._mean) / self._std


def crop_and_flip(images: Tensor, draws: torch.Generator, padding: int = 4) -> Tensor:
    """[B, C, H, W] -> the same shape: each image padded by 0, cropped at a random place and flipped or not."""
    count, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, count, 1), generator=draws)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    flip = torch.rand(count, 1, generator=draws) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    sample = torch.arange(count)[:, None, None, None]
    channel = torch.arange(images.shape[1])[None, :, None, None]
    place = (sample, channel, rows[:, None, :, None], columns[:, None, None, :])
    return padded[tuple(part.to(images.device) for part in place)]


def seeded(*numbers: int) -> torch.Generator:
    """A generator that is a function of a few small numbers: a resumed run draws what an undisturbed one draws."""
    seed = 0
    for number in numbers:
        seed = (1_000_003 * seed + number + 1) % 2**62
    return torch.Generator().manual_seed(seed)


def shuffled_batches(rows: Tensor, size: int, draws: torch.Generator) -> list[Tensor]:
    """All ``rows`` (int64 [N]) in a random order, in batches of at most ``size``, as equal as can be (a last batch of
    one sample would not do for batch normalisation)."""
    order = rows[torch.randperm(len(rows), generator=draws)]
    return list(torch.tensor_split(order, -(-len(rows) // size)))


def read(
    images: Images, batches: Sequence[Tensor], draws: Sequence[torch.Generator | None]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(indices, images) of each batch, augmented by what its generator draws (as in a test where that is None)."""
    if not images.slow or len(batches) < 2:
        for index, own in zip(batches, draws, strict=True):
            yield index, images.batch(index, own)
        return
    with ThreadPoolExecutor(1) as ahead:
        pending = ahead.submit(images.batch, batches[0], draws[0])
        for place, index in enumerate(batches):
            current = pending.result()
            if place + 1 < len(batches):
                pending = ahead.submit(images.batch, batches[place + 1], draws[place + 1])
            yield index, current
