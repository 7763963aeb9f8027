"""Dropout masks of pass 2, used again in pass 3, on the CPU.

Both perturbed passes start from the same generator state, so they draw the same masks. On a CPU drawing them is a good
part of a forward pass: of a small BERT at 32x128 tokens it takes 64 of 239 ms, so that a meta step takes 1.07 seconds
instead of 1.13. (On a GPU it is fused with the multiplication, and nothing is kept.) So pass 2 keeps each mask, in one
byte per element where a training step keeps four, with the states of torch's generator before and after it, and pass 3
copies it if it comes to the same draw from the same state. A draw that does not match is made as usual: this is a
memory of a pure function, and changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_DRAW = torch.ops.aten.bernoulli_.float  # what every dropout on a CPU comes down to, also inside attention


@dataclass(frozen=True)
class _Mask:
    before: Tensor
    probability: float
    mask: Tensor
    after: Tensor


class ReplayedMasks:
    """`with masks.kept():` around pass 2 and `with masks.used():` around pass 3."""

    def __init__(self) -> None:
        self._kept: list[_Mask] = []
        self._next = 0

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Remember the draws of this block; those of an earlier one are forgotten."""
        self._kept.clear()
        with _Draws(self._keep):
            yield

    @contextmanager
    def used(self) -> Iterator[None]:
        """Answer draws from memory where possible; forgets them at the end."""
        self._next = 0
        try:
            with _Draws(self._use) if self._kept else _nothing():
                yield
        finally:
            self._kept.clear()

    def _keep(self, target: Tensor, probability: float) -> None:
        before = torch.get_rng_state()
        target.bernoulli_(probability)
        self._kept.append(_Mask(before, probability, target.to(torch.bool), torch.get_rng_state()))

    def _use(self, target: Tensor, probability: float) -> None:
        known = self._kept[self._next] if self._next < len(self._kept) else None
        if (
            known is None
            or probability != known.probability
            or (target.shape, target.stride()) != (known.mask.shape, known.mask.stride())
            or not torch.equal(torch.get_rng_state(), known.before)
        ):
            target.bernoulli_(probability)
            return
        target.copy_(known.mask)
        torch.set_rng_state(known.after)
        self._next += 1


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every draw of a mask on the CPU from the default generator to `answer`; all other calls pass through."""

    def __init__(self, answer: Callable[[Tensor, float], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._answer = answer

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """torch.compile goes on as if this mode were not there."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DRAW and not kwargs and args[0].device.type == "cpu" and len(args) == 2:
            self._answer(*args)
            return args[0]
        return func(*args, **(kwargs or {}))
