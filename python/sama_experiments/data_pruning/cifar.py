"""CIFAR-10 from its usual folder: the pickled batches ("python version") or the binary ones.

https://www.cs.toronto.edu/~kriz/cifar.html describes both.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from ..common.errors import ExperimentError

TRAIN_BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
TEST_BATCH = "test_batch"
IMAGE = (3, 32, 32)
BYTES = 3 * 32 * 32
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def find_batches(folder: Path) -> Path | None:
    """The folder that holds the batches, if there are any: this one or the one that the archive unpacks to."""
    for place in (folder, folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin"):
        if any((place / f"{TRAIN_BATCHES[0]}{ending}").is_file() for ending in ("", ".bin")):
            return place
    return None


def load_cifar10(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(pixels uint8 [N, 3, 32, 32], labels int64 [N]) of the five training batches, and those of the test batch."""
    binary = (folder / f"{TRAIN_BATCHES[0]}.bin").is_file()
    read = _read_binary if binary else _read_pickle
    parts = []
    for name in [*TRAIN_BATCHES, TEST_BATCH]:
        path = folder / (f"{name}.bin" if binary else name)
        if not path.is_file():
            raise ExperimentError(f"--data: {path} is missing; CIFAR-10 has five training batches and a test batch")
        pixels, labels = read(path)
        if len(labels) == 0 or int(labels.max()) > 9 or int(labels.min()) < 0:
            raise ExperimentError(f"--data: {path} is damaged: its labels are not between 0 and 9")
        parts.append((pixels.view(-1, *IMAGE), labels))
    return (
        torch.cat([pixels for pixels, _ in parts[:-1]]),
        torch.cat([labels for _, labels in parts[:-1]]),
        *parts[-1],
    )


def _read_binary(path: Path) -> tuple[Tensor, Tensor]:
    """Records of a label byte and the bytes of the red, the green and the blue plane."""
    content = numpy.fromfile(path, dtype=numpy.uint8)
    if len(content) % (1 + BYTES):
        raise ExperimentError(f"--data: {path} is damaged: {len(content)} bytes are no multiple of {1 + BYTES}")
    records = torch.from_numpy(content).view(-1, 1 + BYTES)
    return records[:, 1:].contiguous(), records[:, 0].long()


def _read_pickle(path: Path) -> tuple[Tensor, Tensor]:
    """A dictionary with ``data``, uint8 [N, 3072], and ``labels``, a list."""
    try:
        with path.open("rb") as file:
            batch = _OnlyArrays(file, encoding="bytes").load()
        pixels, labels = numpy.asarray(batch[b"data"]), batch[b"labels"]
        if pixels.dtype != numpy.uint8 or pixels.shape != (len(labels), BYTES):
            raise ValueError
        return torch.from_numpy(pixels.copy()), torch.tensor(labels, dtype=torch.int64)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ExperimentError(
            f"--data: {path} is damaged: no pickled dictionary with data (uint8, [N, {BYTES}]) and labels"
        ) from error


class _OnlyArrays(pickle.Unpickler):
    """Unpickles arrays and nothing else: a pickle could otherwise run any code."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "_frombuffer", "scalar"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 pickles bytes for Python 2
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")
