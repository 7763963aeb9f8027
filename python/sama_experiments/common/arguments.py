"""Types of command-line arguments, flags that several programs share, and the dataclasses that hold them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any


def positive(text: str) -> int:
    """An integer >= 1, as a type for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0, as a type for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and finite")
    return value


def share(text: str) -> float:
    """A number above 0, at most 1, as a type for argparse."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and at most 1")
    return value


def number_or_all(text: str) -> int | None:
    """An integer >= 1; ``all`` is None. A type for argparse."""
    return None if text == "all" else positive(text)


def taken(kind: type, values: dict[str, Any], **made: Any) -> Any:
    """An instance of the dataclass ``kind``: its fields from ``made``, else from the parsed ``values``."""
    return kind(**{field.name: values[field.name] for field in fields(kind) if field.name not in made}, **made)


def add_seeds(add: Callable[..., Any], seeds: Sequence[int]) -> None:
    """``--seeds``."""
    shown = " ".join(str(seed) for seed in seeds)
    add("--seeds", nargs="+", type=int, default=list(seeds), metavar="SEED", help=f"(default: {shown})")


def add_score_on(add: Callable[..., Any], validation: str) -> None:
    """``--score-on``; ``validation`` says what is scored on then."""
    help = f"validation: {validation}, for tuning (default: %(default)s)"
    add("--score-on", choices=("test", "validation"), default="test", help=help)


def add_device(add: Callable[..., Any]) -> None:
    """``--device``."""
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: the GPU where there is one)")


def add_out(add: Callable[..., Any], folder: str) -> None:
    """``--out`` and ``--restart``, of a program with checkpoints."""
    add("--out", default=folder, metavar="FOLDER", help="for the JSON and the PNG (default: %(default)s)")
    add("--restart", action="store_true", help="begin anew where an unfinished program left a checkpoint in --out")
