"""Types of command-line arguments."""

from __future__ import annotations

import argparse
import math


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


def layers(text: str) -> int | None:
    """How many upper layers to train; ``all`` is None. A type for argparse."""
    return None if text == "all" else positive(text)
