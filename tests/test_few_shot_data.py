"""The images of the few-shot program: letters of matplotlib's fonts, and Omniglot's folders."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from few_shot_cases import images_of, write_omniglot
from torch import Tensor

from sama_experiments import few_shot
from sama_experiments.common.errors import ExperimentError
from sama_experiments.few_shot import glyphs
from sama_experiments.few_shot.omniglot import load_omniglot
from sama_experiments.few_shot.tasks import Characters


@pytest.fixture(scope="module")
def rendered() -> tuple[list[int], Tensor, Tensor]:
    """Letters that look alike, and others: code points, canvases, which fonts have them."""
    letters = sorted(map(ord, "AΑАBВbcCСOΟОgжЖqs"))
    fonts = list(glyphs.shipped_fonts().values())
    return letters, *glyphs.render(fonts, letters, lambda done: None)


def test_letters_are_in_the_fonts_that_they_are_drawn_from() -> None:
    charmaps = [font.get_charmap() for font in glyphs.shipped_fonts().values()]
    letters = glyphs.common_letters(charmaps)
    assert len(charmaps) == 16 and len(letters) > 400 and {ord("A"), ord("ж"), ord("ψ")} <= set(letters)
    assert not {ord("é"), ord("1"), ord("ﬁ"), 0xE000} & set(letters)
    for code in letters:
        assert sum(charmap.get(code, 0) != 0 for charmap in charmaps) >= glyphs.LEAST_FONTS
    # A font that maps a letter to glyph 0 draws the box of what is missing.
    boxes = [{ord("a"): 0}] * 8 + [{ord("a"): 5, ord("b"): 6}] * 12
    assert glyphs.common_letters(boxes) == [ord("a"), ord("b")]
    assert glyphs.common_letters(boxes[:19]) == []


def test_glyphs_are_centred_and_of_one_size(rendered: tuple[list[int], Tensor, Tensor]) -> None:
    letters, canvases, present = rendered
    assert canvases.shape == (len(letters), 16, 56, 56) and canvases.dtype == torch.uint8
    for image in canvases[present][::7]:
        rows, columns = (image.amax(dim=d).nonzero().squeeze(1) for d in (1, 0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert abs(max(height, width) - glyphs.LONGEST) <= 2
        assert abs(rows[0] + rows[-1] - 55) <= 3 and abs(columns[0] + columns[-1] - 55) <= 3
    assert not canvases[~present].any()


def test_of_look_alikes_one_is_kept(rendered: tuple[list[int], Tensor, Tensor]) -> None:
    """Latin, Greek and Cyrillic A; B and the Cyrillic one; c and C in size alone."""
    letters, canvases, present = rendered
    kept = {chr(letters[row]) for row in glyphs.distinct(canvases, present).tolist()}
    for group in ("AΑА", "BВ", "cCС", "OΟО", "жЖ"):
        assert len(kept & set(group)) == 1, group
    assert {"b", "g", "q", "s"} <= kept


def test_similarity_is_a_mean_of_correlations(rendered: tuple[list[int], Tensor, Tensor]) -> None:
    _, canvases, present = rendered
    present = present.clone()
    present[2, :5] = False
    found = glyphs.similarity(canvases, present)
    small = torch.nn.functional.avg_pool2d(canvases.float(), 4).flatten(2).numpy()
    for i, j in ((0, 2), (2, 5), (4, 4)):
        shared = [f for f in range(16) if present[i, f] and present[j, f]]
        mean = sum(np.corrcoef(small[i, f], small[j, f])[0, 1] for f in shared) / len(shared)
        assert found[i, j].item() == pytest.approx(mean, abs=1e-5)


def test_affine_maps_stay_within_their_bounds() -> None:
    maps = glyphs.affine_maps(500, torch.Generator().manual_seed(0))
    angles = torch.atan2(maps[:, 1, 0], maps[:, 0, 0])
    areas = torch.linalg.det(maps[:, :, :2])
    assert 0.9 * glyphs.ROTATION < angles.abs().max() <= glyphs.ROTATION + 1e-6
    assert areas.min() > math.exp(-2 * glyphs.LOG_SCALE) - 1e-5
    assert areas.max() < math.exp(2 * glyphs.LOG_SCALE) + 1e-5
    assert 0.9 * glyphs.SHIFT < maps[:, :, 2].abs().max() <= glyphs.SHIFT


def test_instances_take_the_fonts_that_have_the_letter(rendered: tuple[list[int], Tensor, Tensor]) -> None:
    """With the affine map away a letter's images are its glyphs, those of 4 fonts of 16 twice."""
    letters, canvases, present = rendered
    with pytest.MonkeyPatch.context() as patched:
        identity = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        patched.setattr(glyphs, "affine_maps", lambda count, generator: identity.expand(count, 2, 3))
        still = glyphs.instances(canvases, present, torch.Generator().manual_seed(0))
    halved = torch.nn.functional.avg_pool2d(canvases.float(), 2)
    assert still.shape == (len(letters), 20, 28, 28)
    for images, glyph, fonts in zip(still, halved, present, strict=True):
        distance = (images.float().unsqueeze(1) - glyph[fonts]).abs().amax(dim=(2, 3))
        assert (distance.amin(dim=1) <= 1).all()
        assert (distance.argmin(dim=1).unique().numel()) == int(fonts.sum())
    moved = [glyphs.instances(canvases[:2], present[:2], torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(moved[0], moved[1]) and not torch.equal(moved[0], moved[2])


def test_omniglot(tmp_path: Path) -> None:
    folder = write_omniglot(tmp_path)
    read: list[int] = []
    plain = load_omniglot(folder, "folders", rotations=False, progress=read.append)
    shapes = {name: tuple(images.shape) for name, images in plain.splits.items()}
    assert shapes == {"train": (22, 3, 28, 28), "validation": (2, 3, 28, 28), "test": (8, 3, 28, 28)}
    assert sum(read) == 32 and plain.splits["train"].dtype == torch.uint8
    # character 5 of the evaluation set: ink in rows 30 to 59 and columns 10 to 39 of 105
    image = plain.splits["test"][4, 0].float()
    assert (
        image[12, 6] == 255 and image[2, 2] == 0 and image.sum() / 255 == pytest.approx((30 * 28 / 105) ** 2, rel=0.02)
    )
    centre = (image.sum(dim=0) * torch.arange(28)).sum() / image.sum()
    assert centre.item() == pytest.approx(25 * 28 / 105 - 0.5, abs=0.1)
    turned = load_omniglot(folder, "folders").splits["test"]
    assert turned.shape == (32, 3, 28, 28)
    for quarter in range(4):
        assert torch.equal(turned[8 * quarter + 4, 0].float(), torch.rot90(image, quarter))
    mixed = load_omniglot(folder, rotations=False).splits
    assert [len(mixed[name]) for name in ("train", "validation", "test")] == [22, 2, 8]
    assert not torch.equal(mixed["test"], plain.splits["test"])


def test_the_program_runs_on_omniglot(tmp_path: Path) -> None:
    folder = write_omniglot(tmp_path / "data")
    arguments = [
        "--data", str(folder), "--ways", "3", "--shots", "1", "--queries", "1", "--test-queries", "2", "--widths", "2",
        "--meta-steps", "2", "--meta-batch", "1", "--test-tasks", "2", "--seeds", "0", "--out", str(tmp_path / "out"),
        "--device", "cpu", "--methods", "sama", "conjugate_gradient", "--paper", "--inner-steps", "2",
    ]  # fmt: skip
    assert few_shot.main(arguments) == 0
    result = json.loads((tmp_path / "out" / "few_shot.json").read_text())
    assert result["data"]["name"] == "Omniglot" and result["data"]["test"] == [32, 3]
    assert [run["method"] for run in result["runs"]] == ["sama", "conjugate_gradient"]


def remove_one(folder: Path) -> None:
    (folder / "images_background" / "Latin" / "character03" / "0003_02.png").unlink()


def spoil_one(folder: Path) -> None:
    (folder / "images_evaluation" / "Tengwar" / "character03" / "0003_02.png").write_text("no image")


def empty_one(folder: Path) -> None:
    (folder / "images_evaluation" / "Tengwar" / "character99").mkdir()


def rename_evaluation(folder: Path) -> None:
    (folder / "images_evaluation").rename(folder / "evaluation")


def fewer_in_evaluation(folder: Path) -> None:
    for file in folder.glob("images_evaluation/*/*/*_03.png"):
        file.unlink()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove_one, "Latin/character03 holds 2 images"),
        (spoil_one, "0003_02.png cannot be read as an image"),
        (empty_one, "character99 holds no .png files"),
        (rename_evaluation, "no folder .*images_evaluation"),
        (fewer_in_evaluation, "3 images of each character in images_background, 2 in images_evaluation"),
    ],
)
def test_bad_omniglot(tmp_path: Path, edit: Callable[[Path], None], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        load_omniglot(write_omniglot(tmp_path, edit))


def test_a_folder_without_characters(tmp_path: Path) -> None:
    (tmp_path / "images_background").mkdir()
    with pytest.raises(ExperimentError, match="holds no characters"):
        load_omniglot(tmp_path)


def test_splits_that_are_too_small() -> None:
    characters = Characters("blocks", {"train": images_of(8), "validation": images_of(4), "test": images_of(8)}, "")
    characters.check(4, 6)
    with pytest.raises(ExperimentError, match="--ways 5: the validation split of blocks has only 4"):
        characters.check(5, 6)
    with pytest.raises(ExperimentError, match="7 images of a class, blocks has 6"):
        characters.check(4, 7)
