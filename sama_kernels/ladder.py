"""Central differences at smaller and larger alpha: which of them is the derivative."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from torch import Tensor

from sama_kernels.diagnosis import STABLE, TOLERANCE, Rung, best, is_stable, known_error

_FIRST = (-8, -6, -4, -2, -1, 0, 2)  # the rungs: alpha 2^k
_FURTHER, _FURTHEST = 4, 60


def climb(
    difference: Callable[[float], Tensor], alpha: float, rounding: float, theta_norm: float, reference: Tensor | None
) -> tuple[tuple[Rung, ...], Tensor | None]:
    """Differences from alpha 2^-8 to alpha 2^2, further up and down until one is accurate or two neighbours agree,
    further up while the largest is the best, and finer around the best if that is not at alpha.

    Arguments:
        difference: called with a length, returns the difference quotient as one float64 vector.
        rounding: a hundredth of this is the shortest step to look for the derivative at; 10 theta_norm the longest.
        reference: the exact derivative, if it is known.
    Returns:
        the ladder, and the reference, extrapolated from the differences if there was none; None if none agree.
    """
    values: dict[int, Tensor] = {}
    wanted, refined = list(_FIRST), False
    while True:
        values |= {k: difference(alpha * 2.0**k) for k in wanted}
        values = dict(sorted(values.items()))
        known = reference if reference is not None else _extrapolated(values)
        ladder = _rungs(values, alpha, known)
        top = best(ladder)
        accurate = known_error(top.error) <= TOLERANCE
        up, down = max(values) + _FURTHER, min(values) - _FURTHER
        settled = accurate or is_stable(ladder, theta_norm)
        wanted = []
        if not settled and down >= -_FURTHEST and alpha * 2.0**down >= 1e-2 * rounding:
            wanted.append(down)
        may_rise = up <= _FURTHEST and (alpha * 2.0**up <= 10 * theta_norm or theta_norm == 0)
        if may_rise and (not settled or (accurate and top == ladder[-1])):
            wanted.append(up)
        if not (wanted or refined):
            k = round(math.log2(top.alpha / alpha))
            wanted, refined = [] if k == 0 else [n for n in (k - 2, k - 1, k + 1, k + 2) if n not in values], True
        if not wanted:
            return ladder, known


def error(value: Tensor, reference: Tensor | None) -> float | None:
    """||value - reference|| / ||reference||; None if there is no reference."""
    return None if reference is None else _change(value, reference)


def _extrapolated(values: dict[int, Tensor]) -> Tensor | None:
    """Richardson's extrapolation of the smallest neighbours that agree, or of larger ones that agree better still;
    None if none do."""
    agreed, least = None, STABLE
    for low, high in itertools.pairwise(values):
        change = _change(values[high], values[low])
        if change <= least:
            agreed, least = (low, high), change
        elif agreed is not None:
            break
    if agreed is None:
        return None
    low, high = agreed
    return values[low] + (values[low] - values[high]) / (4.0 ** (high - low) - 1)


def _rungs(values: dict[int, Tensor], alpha: float, reference: Tensor | None) -> tuple[Rung, ...]:
    rungs: list[Rung] = []
    below: Tensor | None = None
    for k, value in values.items():
        change = None if below is None else _change(value, below)
        rungs.append(Rung(alpha * 2.0**k, error(value, reference), change))
        below = value
    return tuple(rungs)


def _change(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||; infinite where that is zero or not finite."""
    norm = float(reference.norm())
    change = float((value - reference).norm()) / norm if norm else math.inf
    return math.inf if math.isnan(change) else change
