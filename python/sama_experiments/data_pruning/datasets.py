"""The data set that the command line names, in one form."""

from __future__ import annotations

from pathlib import Path

import torch

from ..common.errors import ExperimentError
from . import cifar, image_folder
from .digits import digits_dataset, inject
from .image_folder import FolderImages
from .images import Dataset, InMemoryImages, seeded
from .options import Options


def load(options: Options, seed: int, device: torch.device) -> Dataset:
    """The embedded digits, or what ``--data`` holds, with the wrong labels and copies of this seed put in."""
    if options.data is None:
        return digits_dataset(options.limit, options.noise, options.duplicates, options.score_on, seed, device)
    folder = Path(options.data)
    if not folder.is_dir():
        raise ExperimentError(f"--data {folder}: no such folder")
    batches = cifar.find_batches(folder)
    if batches is not None:
        return _cifar10(batches, options, seed, device)
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        return _image_folder(folder, options, device)
    raise ExperimentError(
        f"--data {folder}: neither CIFAR-10 (data_batch_1 or data_batch_1.bin) nor folders train/ and val/ of images"
    )


def _cifar10(folder: Path, options: Options, seed: int, device: torch.device) -> Dataset:
    pixels, labels, scored_pixels, scored_labels = cifar.load_cifar10(folder)
    order = torch.randperm(len(labels), generator=seeded(0))[: options.limit]
    pixels, labels = pixels[order], labels[order]
    if options.score_on == "validation":
        part = len(labels) // 10
        scored_pixels, scored_labels, pixels, labels = pixels[:part], labels[:part], pixels[part:], labels[part:]
    pixels, labels, truth = inject(pixels, labels, 10, options.noise, options.duplicates, seed)
    mean, std = torch.tensor(cifar.MEAN), torch.tensor(cifar.STD)
    return Dataset(
        name="CIFAR-10",
        train=InMemoryImages(pixels, labels, mean, std, True, device),
        scored=InMemoryImages(scored_pixels, scored_labels, mean, std, False, device),
        classes=10,
        channels=3,
        size=32,
        truth=truth,
    )


def _image_folder(folder: Path, options: Options, device: torch.device) -> Dataset:
    if options.noise or options.duplicates:
        raise ExperimentError("--noise and --duplicates are for the digits and CIFAR-10, not for folders of images")
    train, scored = folder / "train", folder / "val"
    classes = image_folder.class_names(train, scored)
    paths, labels = image_folder.find_images(train, classes)
    scored_paths, scored_labels = image_folder.find_images(scored, classes)
    order = torch.randperm(len(labels), generator=seeded(0))[: options.limit]
    paths, labels = [paths[place] for place in order.tolist()], labels[order]
    if options.score_on == "validation":
        part = len(labels) // 10
        scored_paths, scored_labels, paths, labels = paths[:part], labels[:part], paths[part:], labels[part:]
    size, workers = options.image_size, options.workers
    return Dataset(
        name=folder.resolve().name,
        train=FolderImages(paths, labels, size, workers, device),
        scored=FolderImages(scored_paths, scored_labels, size, workers, device),
        classes=len(classes),
        channels=3,
        size=size,
    )
