"""Dropout masks on the CPU: the bits that torch draws, drawn ten times as fast.

torch takes one number after another from its Mersenne Twister: 5.8 ns for an element of a mask on an AMD EPYC, which
makes the masks of a small BERT a third of its forward pass. `sama::draw_mask` (csrc/cpu/draw_mask.cpp) makes the same
numbers of the same generator state in 0.6 ns. It is used in the passes of a meta step, if it has been seen to agree
with this torch on this machine (on Intel's CPUs torch may draw in another way, in parallel).

Draws are caught by a dispatch mode, which every call of an operator in the loss has to pass through: 6.5 us each. So a
loss that has drawn too little for that is left alone, but for a try now and then: it may be in another mode by then.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from types import CodeType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from sama_kernels.backends import cpu
from sama_kernels.held_values import code_of
from sama_kernels.types import Closure

_library = torch.library.Library("sama", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("draw_mask(Tensor(a!) mask, float probability, Tensor state) -> Tensor")  # type: ignore[no-untyped-call]

_BERNOULLI = torch.ops.aten.bernoulli_.float  # what every dropout on a CPU comes down to, also inside attention
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


_ELEMENTS_PER_CALL = 1250  # of masks for each call of an operator, at which the mode pays for itself
_LEFT_ALONE = 15  # evaluations of a loss for which it did not
_waiting = WeakIdKeyDictionary()  # how many of them are to come, by the loss's code


def fast(loss: Closure, device: torch.device) -> AbstractContextManager[object]:
    """While `loss` is evaluated: masks from torch's generator of the CPU are drawn by `draw`. Changes no bit."""
    if device.type != "cpu" or not agrees():
        return nullcontext()
    code = code_of(loss)
    if code is not None and code in _waiting and _waiting[code] > 0:
        _waiting[code] -= 1
        return nullcontext()
    return _FastDraws(code)


def draw(mask: Tensor, probability: float, generator: torch.Generator) -> None:
    """`mask.bernoulli_(probability, generator=generator)`.

    Arguments:
        mask: contiguous, on the CPU, of a dtype in `_DTYPES`. probability: of a 1, in [0, 1].
    """
    generator.set_state(torch.ops.sama.draw_mask.default(mask, probability, generator.get_state()))


@functools.cache
def agrees() -> bool:
    """Whether `draw` is there, and does here what torch does: asked once, of a generator of its own."""
    if cpu.missing():
        return False
    for dtype in _DTYPES:
        results = []
        for ours in (False, True):
            generator = torch.Generator().manual_seed(2**40 + 1)
            torch.rand(5, generator=generator, device="cpu")  # so that it does not begin with a whole block
            mask = torch.empty(70, 99, dtype=dtype, device="cpu")
            if ours:
                draw(mask, 0.9, generator)
            else:
                mask.bernoulli_(0.9, generator=generator)
            results.append((mask, generator.get_state()))
        if not all(map(torch.equal, *results)):
            return False
    return True


class _FastDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """To be entered where Ctrl-C is held back: between its two halves it would stay on torch's stack of modes."""

    supports_higher_order_operators = True  # flex attention and the like: called as if this mode were not there

    def __init__(self, code: CodeType | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._code = code
        self._calls = self._elements = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if self._code is not None:
            _waiting[self._code] = _LEFT_ALONE if self._elements < _ELEMENTS_PER_CALL * self._calls else 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """torch.compile goes on as if this mode were not there."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._calls += 1
        if func is _BERNOULLI and not kwargs and _can_draw(args[0]):
            self._elements += args[0].numel()
            draw(args[0], args[1] if len(args) > 1 else 0.5, torch.default_generator)  # its default is left out
            return args[0]
        return func(*args, **(kwargs or {}))


def _can_draw(mask: Tensor) -> bool:
    return type(mask) is Tensor and mask.device.type == "cpu" and mask.dtype in _DTYPES and mask.is_contiguous()
