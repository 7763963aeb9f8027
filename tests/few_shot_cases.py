"""Small settings and images for the tests of the few-shot program."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sama_experiments.few_shot.methods import Settings

CPU = torch.device("cpu")
SMALL = Settings(ways=3, inner_steps=3, queries=2, strength=0.7, inner_lr=0.2, test_tasks=4, meta_batch=3, meta_steps=4)


def images_of(classes: int = 8, seed: int = 0) -> Tensor:
    """Blocks of ink in places that differ from class to class, with noise: uint8 [classes, 6, 28, 28]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = F.interpolate(torch.rand(classes, 1, 7, 7, generator=generator), size=28)
    noise = torch.rand(classes, 6, 28, 28, generator=generator)
    return (160 * shapes + 90 * noise).to(torch.uint8)
