"""Small settings and images for the tests of the few-shot program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
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


def write_omniglot(folder: Path, edit: Callable[[Path], None] = lambda folder: None) -> Path:
    """Two alphabets with 12 characters each in images_background, one with 8 in images_evaluation; 3 images each."""
    for name, alphabets, count in (
        ("images_background", ("Greek", "Latin"), 12),
        ("images_evaluation", ("Tengwar",), 8),
    ):
        for alphabet in alphabets:
            for number in range(1, count + 1):
                character = folder / name / alphabet / f"character{number:02}"
                character.mkdir(parents=True)
                for drawer in (1, 2, 3):
                    image = np.full((105, 105), 255, dtype=np.uint8)
                    image[30:60, 2 * number : 2 * number + 30] = 0  # ink is black
                    Image.fromarray(image).convert("1").save(character / f"{number:04}_{drawer:02}.png")
    edit(folder)
    return folder
