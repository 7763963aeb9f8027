"""Generator objects of the caller's own (`torch.Generator`, `numpy.random.default_rng()`, `random.Random()`)."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch


def is_generator(kind: type) -> bool:
    """Whether objects of this class are generators whose state can be set. `random.SystemRandom` has none."""
    if issubclass(kind, random.Random):
        return not issubclass(kind, random.SystemRandom)
    return issubclass(kind, (torch.Generator, *_of_numpy()))


def way_back(generator: Any) -> Callable[[], object]:
    """What brings a generator to where it is now."""
    if isinstance(generator, torch.Generator):
        held = generator.get_state()
        return lambda: generator.set_state(held)
    if isinstance(generator, random.Random):
        drawn = generator.getstate()
        return lambda: generator.setstate(drawn)
    if hasattr(generator, "get_state"):  # numpy.random.RandomState, whose normal draws come in pairs
        both = generator.get_state(legacy=False)
        return lambda: generator.set_state(both)
    bits = getattr(generator, "bit_generator", generator)  # of a numpy.random.Generator, or one alone
    state = bits.state
    return lambda: setattr(bits, "state", state)


def _of_numpy() -> tuple[type, ...]:
    numpy = sys.modules.get("numpy")
    return () if numpy is None else (numpy.random.Generator, numpy.random.RandomState, numpy.random.BitGenerator)
