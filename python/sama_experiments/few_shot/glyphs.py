"""The embedded default: letters of the fonts that come with matplotlib. A class is a code point.

Its instances are its glyphs in several fonts, each under a small random affine map.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from torch import Tensor

from ..common.errors import ExperimentError
from .tasks import SIDE, Characters, split_classes

# What matplotlib ships with letters of several scripts. The cm* fonts have encodings of their own, not Unicode's, and
# LastResort draws one box for every code point of a block.
STYLES = {
    "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
    "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
}
LEAST_FONTS = 12  # that must have a letter: the DejaVu fonts in practice, STIX has fewer letters
INSTANCES = 20  # images of a class, as in Omniglot
LONGEST = 40  # pixels of the longer side of a glyph on the canvas, which is halved in the end
CANVAS = 2 * SIDE
ALIKE = 0.85  # correlation of glyphs, averaged over the fonts, from which on two letters count as look-alikes
SHARES = (0.6, 0.15)  # of the classes that are for meta-training and meta-validation

# Largest rotation in radians, shear, log of the scale, and shift as a share of half of the image.
ROTATION, SHEAR, LOG_SCALE, SHIFT = math.radians(15), 0.2, 0.2, 0.15


def load_glyphs(progress: Callable[[int], None] = lambda done: None, seed: int = 0) -> Characters:
    """Render, drop look-alikes, split by class; always the same images for one version of matplotlib.

    ``progress`` is told the number of fonts done.
    """
    fonts = shipped_fonts()
    letters = common_letters([font.get_charmap() for font in fonts.values()])
    canvases, present = render(list(fonts.values()), letters, progress)
    kept = distinct(canvases, present)
    generator = torch.Generator().manual_seed(seed)
    images = instances(canvases[kept], present[kept], generator)
    return Characters(
        "glyphs",
        split_classes(images, SHARES, seed),
        f"{len(kept)} letters in {len(fonts)} fonts of matplotlib {matplotlib.__version__} ({len(letters)} before "
        "look-alikes were dropped), split by class",
    )


def shipped_fonts() -> dict[str, FT2Font]:
    """The font files by name."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    found = {}
    for family, styles in STYLES.items():
        for style in styles:
            path = folder / f"{family}{style}.ttf"
            if not path.is_file():
                raise ExperimentError(f"matplotlib has no {path}: reinstall it, or name a folder with --data")
            found[path.stem] = FT2Font(str(path))
    return found


def common_letters(charmaps: Sequence[Mapping[int, int]]) -> list[int]:
    """Code points of letters that enough fonts map to a glyph of their own (0 is that of what is missing), sorted.

    Letters that Unicode decomposes are left out: "é" is an "e" with a mark, and its accents would make dozens of nearly
    equal classes.
    """
    fonts = Counter(code for charmap in charmaps for code, glyph in charmap.items() if glyph != 0)
    return sorted(
        code
        for code, count in fonts.items()
        if count >= LEAST_FONTS
        and unicodedata.category(chr(code)) in ("Lu", "Ll", "Lo")
        and unicodedata.normalize("NFKD", chr(code)) == chr(code)
    )


def render(fonts: list[FT2Font], letters: list[int], progress: Callable[[int], None]) -> tuple[Tensor, Tensor]:
    """Glyphs of one size, centred: uint8 [letters, fonts, 56, 56]; bool [letters, fonts]: which fonts have a letter."""
    canvases = torch.zeros(len(letters), len(fonts), CANVAS, CANVAS, dtype=torch.uint8)
    present = torch.zeros(len(letters), len(fonts), dtype=torch.bool)
    for column, font in enumerate(fonts):
        charmap = font.get_charmap()
        for row, code in enumerate(letters):
            if charmap.get(code, 0) == 0:
                continue
            longest = max(_bitmap(font, code, 64).shape)
            bitmap = _bitmap(font, code, 64 * LONGEST / longest)[:CANVAS, :CANVAS]
            height, width = bitmap.shape
            top, left = (CANVAS - height) // 2, (CANVAS - width) // 2
            canvases[row, column, top : top + height, left : left + width] = bitmap
            present[row, column] = bool(bitmap.any())
        progress(1)
    return canvases, present


def _bitmap(font: FT2Font, code: int, points: float) -> Tensor:
    """uint8 [height, width] of the glyph at so many pixels per em, cut to its ink."""
    font.set_size(points, 72)
    font.set_text(chr(code))
    font.draw_glyphs_to_bitmap(antialiased=True)
    return torch.from_numpy(np.array(font.get_image()))


def similarity(canvases: Tensor, present: Tensor) -> Tensor:
    """float32 [letters, letters]: correlation of glyphs at 14 x 14, the mean over the fonts that have both letters."""
    count, fonts = present.shape
    small = F.avg_pool2d(canvases.flatten(0, 1).unsqueeze(1).float(), CANVAS // 14).view(count, fonts, -1)
    small = F.normalize(small - small.mean(dim=2, keepdim=True), dim=2) * present.unsqueeze(2)
    shared = present.float() @ present.float().T
    return torch.einsum("ifp,jfp->ij", small, small) / shared.clamp(min=1)


def distinct(canvases: Tensor, present: Tensor) -> Tensor:
    """Rows (int64, sorted) of letters of which no two look alike: the first of each group, in the order given.

    Size says nothing here, so that C and c are look-alikes, as are A and the Greek and Cyrillic A: in different splits
    they would let a class of the test be one that was trained on.
    """
    alike = similarity(canvases, present) >= ALIKE
    kept: list[int] = []
    for row in range(len(canvases)):
        if present[row].any() and not alike[row, kept].any():
            kept.append(row)
    return torch.tensor(kept)


def instances(canvases: Tensor, present: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 [letters, 20, 28, 28]: its fonts in turn, in random order, each time under another affine map."""
    made = []
    for glyphs, fonts in zip(canvases, present, strict=True):
        available = fonts.nonzero().squeeze(1)
        order = available[torch.randperm(len(available), generator=generator)]
        chosen = glyphs[order[torch.arange(INSTANCES) % len(order)]].float().unsqueeze(1)
        grid = F.affine_grid(affine_maps(INSTANCES, generator), list(chosen.shape), align_corners=False)
        moved = F.avg_pool2d(F.grid_sample(chosen, grid, align_corners=False), CANVAS // SIDE)
        made.append(moved.squeeze(1).round().to(torch.uint8))
    return torch.stack(made)


def affine_maps(count: int, generator: torch.Generator) -> Tensor:
    """float32 [count, 2, 3]: rotation, shear and scales of both axes, and shift, each uniform between its bounds."""

    def uniform(bound: float) -> Tensor:
        return bound * (2 * torch.rand(count, generator=generator) - 1)

    angle, shear, wide, high = uniform(ROTATION), uniform(SHEAR), uniform(LOG_SCALE).exp(), uniform(LOG_SCALE).exp()
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)
    stretch = torch.zeros(count, 2, 2)
    stretch[:, 0, 0], stretch[:, 0, 1], stretch[:, 1, 1] = wide, shear, high
    shift = torch.stack([uniform(SHIFT), uniform(SHIFT)], dim=1).unsqueeze(2)
    return torch.cat([rotation @ stretch, shift], dim=2)
