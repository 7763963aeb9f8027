"""What the ranks of a group tell each other besides gradients: what they are about to reduce, and how it went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_agreed: set[tuple[Any, ...]] = set()


def describe(tensors: Sequence[Tensor]) -> tuple[tuple[tuple[int, ...], str], ...]:
    """Shapes and dtypes: what has to be the same on all ranks."""
    return tuple((tuple(t.shape), str(t.dtype)) for t in tensors)


def agree(group: Any, description: dict[str, Any]) -> None:
    """Raise on every rank, before the first collective of a meta step, unless all are about to make the same one.

    The ranks exchange descriptions when theirs is new, that is at the first meta step.

    Arguments:
        description: by the name of the argument: anything that compares with `==` and prints well.
    Raises:
        ValueError: names the argument that differs and what each rank has.
    """
    key = (id(group), *((name, value) for name, value in description.items()))
    if key in _agreed:
        return
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, description, group=group)
    for name in description:
        values = [other[name] for other in everyone]
        if any(value != values[0] for value in values):
            rank = next(r for r, value in enumerate(values) if value != values[0])
            raise ValueError(
                f"{name}: the ranks disagree: rank 0 has {_short(values[0], values[rank])}, rank {rank} has"
                f" {_short(values[rank], values[0])}; call the meta step with the same parameters, in the same order,"
                " and the same options on every rank"
            )
    _agreed.add(key)


def _short(value: Any, other: Any) -> str:
    """`value`, or of two long lists what differs first."""
    if isinstance(value, tuple) and isinstance(other, tuple):
        if len(value) != len(other):
            return f"{len(value)} tensors"
        at = next(i for i, (a, b) in enumerate(zip(value, other, strict=True)) if a != b)
        return f"{value[at]} as tensor {at}"
    return repr(value)


class Status:
    """How a meta step went on each rank; summed over the ranks at its end, in one small collective.

    Every rank takes part, also one whose closure raised, so that none waits for ever.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group = group
        self._rank = dist.get_rank(group)
        world = dist.get_world_size(group)
        # failed[rank], degenerate[rank], not_finite[rank]
        self._flags = torch.zeros((3, world), dtype=torch.float32, device=device)
        self.reported = False

    def report(self, *, failed: bool = False, degenerate: Tensor | bool = False, finite: Tensor | bool = True) -> None:
        """Say how it went here, and learn how it went elsewhere."""
        self.reported = True
        mine = self._flags[:, self._rank]
        mine[0], mine[1], mine[2] = float(failed), degenerate, ~torch.as_tensor(finite)
        dist.all_reduce(self._flags, group=self._group)

    def degenerate(self) -> Tensor:
        """0-dim bool: no rank has a meta gradient, or the norm of one is not finite. Read on the device."""
        return (self._flags[1] > 0).all() | (self._flags[2] > 0).any()

    def failed_ranks(self) -> list[int]:
        """Ranks on which a closure raised. Copies to the host."""
        return [rank for rank, flag in enumerate(self._flags[0].tolist()) if flag]
