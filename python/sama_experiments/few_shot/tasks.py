"""Characters split by class, and the N-way K-shot tasks that are drawn from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.errors import ExperimentError

SIDE = 28  # pixels, as in all work on Omniglot since Vinyals et al. 2016
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Characters:
    """Images of characters: each class is in one split only.

    Attributes:
        name: for titles.
        splits: "train", "validation", "test" -> uint8 [classes, instances, 28, 28]; 255 is ink, 0 is paper.
        origin: one sentence on where the images come from and how they were split.
    """

    name: str
    splits: dict[str, Tensor]
    origin: str

    def check(self, ways: int, images: int) -> None:
        """Every split must be able to give a task of so many classes with so many images each."""
        for split, found in self.splits.items():
            if len(found) < ways:
                raise ExperimentError(f"--ways {ways}: the {split} split of {self.name} has only {len(found)} classes")
            if found.shape[1] < images:
                raise ExperimentError(
                    f"--shots and queries ask for {images} images of a class, {self.name} has {found.shape[1]} of each"
                )


@dataclass(frozen=True)
class FewShotTask:
    """A task: images float32 [rows, 1, 28, 28] in 0..1, labels int64 [rows] below N.

    The support set (N * K rows) is to be learned from, the query set to be classified.
    """

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor


def draw_task(
    images: Tensor, ways: int, shots: int, queries: int, generator: torch.Generator, device: torch.device
) -> FewShotTask:
    """A task of ``ways`` classes of ``images`` (uint8 [classes, instances, 28, 28]).

    Of each class ``shots`` images go to the support set and ``queries`` other ones to the query set.
    """
    classes, instances = images.shape[:2]
    chosen = torch.randperm(classes, generator=generator)[:ways]
    order = torch.rand(ways, instances, generator=generator).argsort(dim=1)[:, : shots + queries]
    drawn = images[chosen.unsqueeze(1), order].to(device).float().unsqueeze(2) / 255  # [ways, shots + queries, 1, h, w]
    labels = torch.arange(ways, device=device)
    return FewShotTask(
        support=drawn[:, :shots].flatten(0, 1),
        support_labels=labels.repeat_interleave(shots),
        query=drawn[:, shots:].flatten(0, 1),
        query_labels=labels.repeat_interleave(queries),
    )


def split_classes(images: Tensor, shares: tuple[float, float], seed: int) -> dict[str, Tensor]:
    """Classes (the first dimension of ``images``) in random order into train, validation and test.

    ``shares`` are those of train and validation; the rest is for test.
    """
    count = len(images)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    first, second = round(shares[0] * count), round((shares[0] + shares[1]) * count)
    parts = (order[:first], order[first:second], order[second:])
    return {name: images[part.sort().values] for name, part in zip(SPLITS, parts, strict=True)}
