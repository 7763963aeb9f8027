"""The ops as they are measured: stated traffic, the state they start from, and the check before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.contenders import Contender, Library
from bench.inputs import Precision
from sama_kernels import ops

SEED = 20231

# Relative distance to the reference backend's result (L2 norm over the list) up to which a contender counts as right.
# For the ops themselves far too much (the tests hold them to bits and ulps); it is what `torch._foreach_*` needs, which
# rounds to bf16 after every step, and whose formula for Adam (contenders.foreach_adam) deviates by about 1e-6.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Op:
    """One op; `begin` brings about the state before it, `reset` the same before every timed call, if it must be."""

    name: str
    bytes_per_element: int
    call: Callable[[Any], object]
    begin: Callable[[Contender], object]
    reset: Callable[[Contender], object]
    result: Callable[[Contender], list[Tensor]]  # what it wrote
    exact: bool = False
    only_library: bool = False


def op_list(precision: Precision) -> list[Op]:
    """All ops for these dtypes; the traffic is what their docstrings state."""
    value, state = precision.values.itemsize, precision.state.itemsize
    adam, moves = 3 * value + 2 * state, (4 + 4 + 3) * value
    rows = [
        Op("adapt_norm_adam", adam, lambda c: c.adapt_norm_adam(), fresh, fresh_v, v),
        Op("adapt_norm_adam8bit", 3 * value + 2, lambda c: c.adapt_norm_adam8bit(), fresh, fresh_v, v),
        Op("adapt_norm_rmsprop", 3 * value + state, lambda c: c.adapt_norm_rmsprop(), fresh, fresh_v, v),
        Op("adapt_norm_nadam", adam, lambda c: c.adapt_norm_nadam(), fresh, fresh_v, v),
        Op("adapt_norm_adadelta", adam, lambda c: c.adapt_norm_adadelta(), fresh, fresh_v, v),
        Op("adapt_norm_scale", 2 * value, lambda c: c.adapt_norm_scale(), fresh, nothing, v),
        Op("step_size", 0, lambda c: c.step_size(), fresh, nothing, no_list),
        Op("perturb_plus", 4 * value, lambda c: c.plus(), fresh, fresh, params),
        Op("perturb_minus", 4 * value, lambda c: c.minus(), moved, nothing, params),
        Op("restore", 3 * value, lambda c: c.restore(), moved, nothing, params, exact=True),
        Op("central_difference", 3 * value, lambda c: c.central_difference(), fresh, nothing, v),
        Op("element_wise_part", adam + moves, lambda c: c.element_wise_part(), fresh, fresh_v, params),
    ]
    if value == 2:
        stochastic, measured = {"rounding": ops.STOCHASTIC, "seed": SEED}, {"measure": True}
        for suffix, options in {"stochastic": stochastic, "measured": measured, "both": stochastic | measured}.items():
            rows.append(
                Op(f"perturb_plus_{suffix}", 4 * value, lambda c, o=options: c.plus(**o), fresh, fresh, params,
                   only_library=True)
            )  # fmt: skip
    return rows


def fresh(contender: Contender) -> None:
    contender.fresh()


def fresh_v(contender: Contender) -> None:
    contender.fresh_v()


def moved(contender: Contender) -> None:
    """theta+: `restore` and `perturb` MINUS bring back what they find when they are called twice."""
    contender.fresh()
    contender.plus()


def nothing(contender: Contender) -> None:
    pass


def v(contender: Contender) -> list[Tensor]:
    return contender.v


def params(contender: Contender) -> list[Tensor]:
    return contender.params


def no_list(contender: Contender) -> list[Tensor]:
    return []


@dataclass(frozen=True)
class Expected:
    """What the reference backend made of the inputs."""

    tensors: list[Tensor]
    scalar: Tensor | None

    @classmethod
    def of(cls, op: Op, reference: Library) -> Expected:
        op.begin(reference)
        # Stochastic rounding is held to rounding to nearest, from which it may be one unit away: the reference makes
        # its random numbers in int64 tensors of many times the model's size.
        returned = reference.plus() if op.only_library else op.call(reference)
        return cls([x.clone() for x in op.result(reference)], scalar(returned))


def scalar(returned: object) -> Tensor | None:
    return returned.double().cpu() if isinstance(returned, Tensor) and returned.numel() == 1 else None


def fault(op: Op, contender: Contender, expected: Expected, tolerance: float) -> str | None:
    """Why `contender` must not be timed: it raises, or its result is not the reference's. None if all is well."""
    try:
        op.begin(contender)
        returned = op.call(contender)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    limit = 0.0 if op.exact else tolerance
    distance = relative_distance(op.result(contender), expected.tensors)
    if not distance <= limit:  # also if it is NaN
        return f"differs from the reference by {distance:.2g} (relative L2 norm), allowed are {limit:g}"
    if expected.scalar is None:
        return None
    value = scalar(returned)
    close = value is not None and bool((value / expected.scalar - 1).abs() <= contender.scalar_tolerance)
    return None if close else f"returns {value}, the reference returns {expected.scalar}"


def relative_distance(tensors: list[Tensor], expected: list[Tensor]) -> float:
    """||tensors - expected|| / ||expected|| over the whole list, right to a few per cent.

    Norms are summed in float32: of 1e8 elements that costs 1 % on a CPU, where float64 would cost a second.
    """
    difference, size = 0.0, 0.0
    for a, b in zip(tensors, expected, strict=True):
        wide = torch.promote_types(b.dtype, torch.float32)
        b = b.to(wide)
        difference += torch.linalg.vector_norm(a.to(wide) - b).item() ** 2
        size += torch.linalg.vector_norm(b).item() ** 2
    return math.sqrt(difference / size) if size else math.sqrt(difference)
