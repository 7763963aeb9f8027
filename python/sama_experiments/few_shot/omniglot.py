"""Omniglot (Lake et al. 2015) from its own folders: images_background and images_evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..common.errors import ExperimentError
from .tasks import SIDE, Characters, split_classes

FOLDERS = ("images_background", "images_evaluation")
RANDOM_SHARES = (1100 / 1623, 100 / 1623)  # MAML and iMAML: of the 1623 characters of both folders 1100, 100 and 423
BACKGROUND_SHARES = (0.9, 0.1)  # of images_background, where images_evaluation is for the test


def load_omniglot(
    folder: Path,
    split: str = "random",
    rotations: bool = True,
    progress: Callable[[int], None] = lambda done: None,
    seed: int = 0,
) -> Characters:
    """All characters, 28 x 28, ink 255; every process reads them for itself.

    Arguments:
        split: "random": the characters of both folders in random order, as in MAML and iMAML; "folders":
            images_evaluation, whose alphabets are others, for the test, images_background for the rest.
        rotations: the characters turned by 90, 180 and 270 degrees are further classes, in the split of the character.
        progress: is told the number of characters read.
        seed: of the split.
    """
    background, evaluation = (_read_characters(folder / name, progress) for name in FOLDERS)
    if background.shape[1] != evaluation.shape[1]:
        raise ExperimentError(
            f"{folder}: {background.shape[1]} images of each character in {FOLDERS[0]}, {evaluation.shape[1]} in "
            f"{FOLDERS[1]}; they must be the same number"
        )
    if split == "random":
        splits = split_classes(torch.cat([background, evaluation]), RANDOM_SHARES, seed)
    else:
        splits = {**split_classes(background, BACKGROUND_SHARES, seed), "test": evaluation}
    if rotations:
        splits = {name: with_rotations(images) for name, images in splits.items()}
    kinds = "each in four rotations" if rotations else "without rotations"
    origin = f"{len(background) + len(evaluation)} characters of {folder}, {kinds}, split: {split}"
    return Characters("Omniglot", splits, origin)


def with_rotations(images: Tensor) -> Tensor:
    """[classes, instances, 28, 28] -> [4 classes, instances, 28, 28]."""
    return torch.cat([torch.rot90(images, quarter, dims=(2, 3)) for quarter in range(4)])


def _read_characters(folder: Path, progress: Callable[[int], None]) -> Tensor:
    """uint8 [characters, instances, 28, 28] of one of the two folders, in the order of the names."""
    if not folder.is_dir():
        raise ExperimentError(f"--data: no folder {folder} (Omniglot has {' and '.join(FOLDERS)})")
    found: list[Tensor] = []
    first: Path | None = None
    for character in sorted(path for path in folder.glob("*/*") if path.is_dir()):
        files = sorted(character.glob("*.png"))
        if not files:
            raise ExperimentError(f"{character} holds no .png files: remove the folder, or unpack Omniglot again")
        images = torch.stack([_read_image(file) for file in files])
        if first is not None and len(images) != len(found[0]):
            raise ExperimentError(
                f"{character} holds {len(images)} images, {first} {len(found[0])}: all need the same number"
            )
        first = first or character
        found.append(images)
        progress(1)
    if not found:
        raise ExperimentError(f"{folder} holds no characters: they are expected in <alphabet>/<character>/*.png")
    return torch.stack(found)


def _read_image(file: Path) -> Tensor:
    """uint8 [28, 28]; the files have black ink on white paper."""
    try:
        with Image.open(file) as image:
            small = image.convert("L").resize(
                (SIDE, SIDE), Image.Resampling.BILINEAR
            )  # averages over what it leaves out
    except (OSError, UnidentifiedImageError) as error:
        raise ExperimentError(f"{file} cannot be read as an image: {error}") from error
    return 255 - torch.from_numpy(np.array(small))
