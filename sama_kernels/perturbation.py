"""`Perturbation`: theta between the passes of a meta step, and its way back."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sama_kernels import ops
from sama_kernels.backends.reference import bits
from sama_kernels.distributed import fsdp, sharded


class Perturbation:
    """theta -> theta+ -> theta-, and back bit for bit when the block is left, however it is left.

    v's memory is used up: it holds what brings theta back (`ops.perturb`). Of sharded parameters this rank's parts
    move; what FSDP has gathered of them it is told to gather anew.
    """

    def __init__(self, params: Sequence[Tensor], v: list[Tensor], backend: str, fsdp: Sequence[Any] = ()) -> None:
        self.params: list[Tensor] = sharded.locals_of(params)
        self.v = v
        self._parts = sharded.by_groups(params, range(len(params)))
        self._numbers = [sharded.part_number(params[rows[0]]) for rows in self._parts.values()]
        self._backend = backend
        self._fsdp = fsdp
        self._versions = tuple(p._version for p in self.params)
        self._moved = False
        self._has_moved = False
        self._kept = False

    def __enter__(self) -> Perturbation:
        fsdp.reshard(self._fsdp)  # what is gathered from here on is frozen
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._moved:
            self.toggle()
        if self._has_moved and not self._kept:
            # The same bits as before: a graph of the caller's that saved theta may still be used.
            torch._C._autograd._unsafe_set_version_counter(tuple(self.params), self._versions)
        fsdp.reshard(self._fsdp)
        fsdp.forget_forward_passes(self._fsdp)

    def plus(self, epsilon: Tensor, rounding: int, seed: int) -> Tensor | None:
        """theta -> theta+ = theta + epsilon v.

        Returns: what was realised of it, as `ops.perturb` measures it; None if all parameters are of 32 or 64 bits,
        whose rounding is far below a step.
        """
        measure = any(p.element_size() == 2 for p in self.params)
        steps = []
        self._moved = self._has_moved = True
        for (groups, rows), number in zip(self._parts.items(), self._numbers, strict=True):
            step = ops.perturb(
                [self.params[i] for i in rows], [self.v[i] for i in rows], epsilon, ops.PLUS,
                rounding=rounding, seed=_seed_of_part(seed, number), measure=measure, backend=self._backend,
            )  # fmt: skip
            steps.append(sharded.sum_over(step, groups) if measure else step)
        fsdp.reshard(self._fsdp)
        return torch.stack(steps).sum(0) if measure else None

    def minus(self, epsilon: Tensor) -> None:
        """theta+ -> theta- = theta - epsilon v."""
        ops.perturb(self.params, self.v, epsilon, ops.MINUS, backend=self._backend)
        fsdp.reshard(self._fsdp)

    def toggle(self) -> None:
        """theta+- -> theta, or back again."""
        ops.restore(self.params, self.v, backend=self._backend)
        self._moved = not self._moved
        fsdp.reshard(self._fsdp)

    def keep(self, unless: Tensor | None = None) -> None:
        """Leave theta where it is: at theta-, which is the paper's base update theta - epsilon v.

        But where `unless` (bool, 0-dim, on the device) is True theta comes back, as ever.
        """
        self._kept = True
        if unless is None:
            self._moved = False
        else:
            # The XOR bits that the way back takes: without them theta stays where it is.
            torch._foreach_mul_([bits(x) for x in self.v], unless)


def _seed_of_part(seed: int, number: int) -> int:
    """Another seed for each part of a sharded parameter, the first having `seed`; signed 64-bit."""
    return (seed + number * 0xD1B54A32D192ED03 + 2**63) % 2**64 - 2**63
