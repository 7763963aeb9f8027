"""The lists of tensors that the kernels are measured on."""

from __future__ import annotations

import math
import random

Shapes = list[tuple[int, ...]]


def encoder(vocabulary: int, width: int, layers: int) -> Shapes:
    """The parameters of a BERT encoder with a pooler, in their order."""
    shapes: Shapes = [(vocabulary, width), (512, width), (2, width), (width,), (width,)]
    for _ in range(layers):
        shapes += [(width, width), (width,)] * 4 + [(width,)] * 2
        shapes += [(4 * width, width), (4 * width,), (width, 4 * width), (width,), (width,), (width,)]
    return [*shapes, (width, width), (width,)]


def decoder(vocabulary: int, width: int, layers: int, kv_width: int, inner: int) -> Shapes:
    """The parameters of a Llama with grouped keys and values; the output layer is tied to the embedding."""
    shapes: Shapes = [(vocabulary, width)]
    for _ in range(layers):
        shapes += [(width, width), (kv_width, width), (kv_width, width), (width, width)]
        shapes += [(inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [*shapes, (width,)]


def tiny(count: int, longest: int, seed: int = 0) -> Shapes:
    """Vectors of 1 to `longest` elements, the same ones every time."""
    lengths = random.Random(seed)
    return [(lengths.randint(1, longest),) for _ in range(count)]


LISTS: dict[str, Shapes] = {
    "flat": [(100_000_000,)],
    "bert-base": encoder(30522, 768, 12),
    "tiny": tiny(2000, 300),
    "minilm": encoder(30522, 384, 6),
    "llama-1b": decoder(128256, 2048, 16, kv_width=512, inner=8192),
}


def elements(shapes: Shapes) -> int:
    """Elements in the whole list."""
    return sum(math.prod(shape) for shape in shapes)


def scaled(shapes: Shapes, scale: float) -> Shapes:
    """As many tensors, each with about `scale` times its rows (at least one), to try a measurement out.

    Lists of less than a million elements are small enough as they are.
    """
    if elements(shapes) < 1_000_000:
        return shapes
    return [(max(1, round(shape[0] * scale)), *shape[1:]) for shape in shapes]
