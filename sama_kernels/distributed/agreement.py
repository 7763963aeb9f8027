"""What the ranks of a group tell each other besides gradients: what they are about to reduce, and how it went."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from sama_kernels.distributed.meeting import all_say, itself

# Descriptions that all ranks have, and their digests. By the group itself: the id of a group that was destroyed comes
# back, on one rank and not on another.
_agreed: WeakKeyDictionary[Any, dict[tuple[Any, ...], str]] = WeakKeyDictionary()


def describe(tensors: Sequence[Tensor]) -> tuple[tuple[tuple[int, ...], str], ...]:
    """Shapes and dtypes: what has to be the same on all ranks."""
    return tuple((tuple(t.shape), str(t.dtype)) for t in tensors)


def agree(
    group: Any, description: dict[str, Any], device: torch.device, at_first: dict[str, Any] | None = None
) -> None:
    """Raise on every rank, before the first collective of a meta step, unless all are about to make the same one.

    The ranks compare digests at every meta step, and exchange what they stand for when those differ or are new.

    Arguments:
        description: by the name of the argument: anything that compares with `==`, and has a `repr` that says all.
        at_first: likewise, of what may change from step to step, which must not make the ranks exchange it every time.
        device: of the parameters. NCCL sends objects from the current one, which all ranks share (cuda:0) where nobody
            has called torch.cuda.set_device.
    Raises:
        ValueError: names the argument that differs and what each rank has.
    """
    if dist.get_world_size(group) == 1:
        return
    known = _agreed.setdefault(itself(group), {})
    key = tuple(description.items())
    digest = known.get(key) or _digest(key)
    if all_say(group, _digest((digest, at_first))) and key in known:
        return
    description = {**description, **(at_first or {})}
    everyone: list[Any] = [None] * dist.get_world_size(group)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        dist.all_gather_object(everyone, description, group=group)
    for name in description:
        values = [other[name] for other in everyone]
        if any(value != values[0] for value in values):
            other = next(r for r, value in enumerate(values) if value != values[0])
            first, rank = _names(group, [0, other])
            raise ValueError(
                f"{name}: the ranks disagree: rank {first} has {_short(values[0], values[other])}, rank {rank} has"
                f" {_short(values[other], values[0])}; call the meta step with the same parameters, in the same order,"
                " and the same options on every rank"
            )
    known[key] = digest


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _names(group: Any, places: Sequence[int]) -> list[int]:
    """The ranks, among all processes, of members of a group."""
    ranks = dist.get_process_group_ranks(itself(group))
    return [ranks[place] for place in places]


def _short(value: Any, other: Any) -> str:
    """`value`, or of two long lists what differs first."""
    if isinstance(value, tuple) and isinstance(other, tuple):
        if len(value) != len(other):
            return f"{len(value)} tensors"
        at = next(i for i, (a, b) in enumerate(zip(value, other, strict=True)) if a != b)
        return f"{value[at]} as tensor {at}"
    return repr(value)


@dataclass(frozen=True)
class Verdict:
    """How a meta step went on all ranks; tensors are 0-dim.

    Attributes:
        losses: the averages of the losses that the ranks reported.
        degenerate: bool: no rank has a derivative.
        bad: bool: the sums are not to be used, as a rank has a loss or a norm that is not finite.
        complete: bool: every rank has reported. For one that has failed, a stand-in has, with zeros.
    """

    losses: list[Tensor]
    degenerate: Tensor
    bad: Tensor
    complete: Tensor


class Status:
    """One small all-reduce at the end of a meta step."""

    PRESENT, DEGENERATE, NOT_FINITE = range(3)

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group, self._device = group, device
        self._rank, self._world = dist.get_rank(group), dist.get_world_size(group)

    def report(self, losses: Sequence[Tensor], degenerate: Tensor, finite: Tensor) -> Verdict:
        """Say how it went here, and learn how it went elsewhere.

        Arguments:
            losses: three, 0-dim, already multiplied with this rank's shares.
        """
        flags = torch.zeros((3, self._world), dtype=torch.float64, device=self._device)
        flags[self.PRESENT, self._rank] = 1
        flags[self.DEGENERATE, self._rank], flags[self.NOT_FINITE, self._rank] = degenerate, ~finite
        everything = torch.cat([flags.flatten(), *(x.reshape(1).double() for x in losses)])
        dist.all_reduce(everything, group=self._group)
        flags, sums = everything[:-3].view(3, self._world), everything[-3:]
        present, degenerate_ranks, not_finite = (flags > 0).unbind()
        return Verdict(list(sums.unbind()), degenerate_ranks.all(), not_finite.any(), present.all())
