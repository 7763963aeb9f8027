"""Images in a folder for each class, as ImageNet comes: ``train/<class>/*``, ``val/<class>/*``; read as they are used.

Pillow decodes, crops and scales in threads while the model trains.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from ..common.errors import ExperimentError

ENDINGS = (".jpg", ".jpeg", ".png")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def find_images(folder: Path, classes: list[str]) -> tuple[list[Path], Tensor]:
    """(files, labels int64 [N]) of ``<folder>/<class>/*``, in the order of their names."""
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in ENDINGS)
        if not found:
            raise ExperimentError(f"--data: {folder / name} holds no image ({', '.join(ENDINGS)})")
        paths += found
        labels += [label] * len(found)
    return paths, torch.tensor(labels)


def class_names(train: Path, scored: Path) -> list[str]:
    """The names of the class folders, which have to be the same in both."""
    names, others = ({path.name for path in folder.iterdir() if path.is_dir()} for folder in (train, scored))
    if len(names) < 2:
        raise ExperimentError(f"--data: {train} has {len(names)} class folder(s); at least 2 are needed")
    if names != others:
        odd = sorted(names ^ others)[0]
        raise ExperimentError(f"--data: class {odd} is in only one of {train} and {scored}")
    return sorted(names)


class FolderImages:
    """Images that are read from their files batch by batch.

    Args:
        paths, labels: of the N images.
        size: side of the square crop: for training a random part of the image, scaled, and flipped or not (Szegedy et
            al., 2015); for a test the middle, after the shorter side was scaled to size * 256 / 224.
        workers: threads that decode.
        device: where batches go.
    """

    def __init__(self, paths: list[Path], labels: Tensor, size: int, workers: int, device: torch.device) -> None:
        self.slow = True
        self.paths = paths
        self.labels = labels.to(device)
        self.size = size
        self.device = device
        self._threads = ThreadPoolExecutor(workers)
        self._mean, self._std = (torch.tensor(value).view(1, 3, 1, 1).to(device) for value in (MEAN, STD))

    def batch(self, index: Tensor, draws: torch.Generator | None) -> Tensor:
        """See ``Images``."""
        places = index.tolist()
        chances = [None] * len(places) if draws is None else list(torch.rand(len(places), 5, generator=draws))
        read = partial(_read, size=self.size)
        arrays = list(self._threads.map(read, [self.paths[place] for place in places], chances))
        pixels = torch.from_numpy(numpy.stack(arrays)).to(self.device).permute(0, 3, 1, 2)
        return ((pixels.float() / 255 - self._mean) / self._std).contiguous()


def _read(path: Path, chances: Tensor | None, size: int) -> Any:
    """One image, cropped and scaled: uint8 [size, size, 3]."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for some damaged PNG files
        raise ExperimentError(f"--data: {path} cannot be read as an image") from error
    box = _middle(*image.size) if chances is None else random_box(*image.size, chances)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if chances is not None and chances[4] < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return numpy.asarray(image)


def random_box(width: int, height: int, chances: Tensor) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of 8 to 100 % of the area at a ratio of sides between 3/4 and 4/3; ``chances`` [5]
    are uniform in [0, 1). What would be wider or higher than the image is cut to it."""
    share, ratio, across, down = chances[:4].tolist()
    area = (0.08 + 0.92 * share) * width * height
    side = math.exp((2 * ratio - 1) * math.log(4 / 3))
    box_width, box_height = min(math.sqrt(area * side), width), min(math.sqrt(area / side), height)
    left, top = across * (width - box_width), down * (height - box_height)
    return left, top, left + box_width, top + box_height


def _middle(width: int, height: int) -> tuple[float, float, float, float]:
    side = min(width, height) * 224 / 256
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
