"""What a meta step must leave as it found it: interrupts, random number generators, requires_grad flags."""

from __future__ import annotations

import random
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from sama_kernels import generators


class Interrupts:
    """Holds Ctrl-C back while state is half changed, and lets it through while user code runs.

    `with Interrupts() as interrupts:` defers SIGINT; inside, `with interrupts.allowed():` is a stretch in which
    KeyboardInterrupt may be raised. What arrived in between is raised at the next `allowed()` or at the end. Outside
    the main thread Python never raises KeyboardInterrupt, so there is nothing to do.
    """

    def __init__(self) -> None:
        self._previous: Any = None
        self._pending: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> Interrupts:
        previous = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(previous):
            signal.signal(signal.SIGINT, self._hold)
            self._previous = previous
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._deliver()

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """A stretch in which Ctrl-C works as usual; everything must be restorable when it is entered."""
        if self._previous is None:
            yield
            return
        try:
            signal.signal(signal.SIGINT, self._previous)
            self._deliver()
            yield
        finally:
            signal.signal(signal.SIGINT, self._hold)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._pending = (number, frame)

    def _deliver(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._previous(*pending)


class RngState:
    """The state of every generator a loss may draw from: torch's (of the CPU and of all GPUs: frozen layers may be on
    another one than theta), Python's, NumPy's, and generator objects of the caller's own.

    `with RngState(own) as rng:` leaves the first three as it found them. Generators of the caller's own go on from
    meta step to meta step, or a meta loss that draws its batch with one would get the same batch for ever: they are
    left where `follow` found them, and where they were after an error.

    Arguments:
        own: generator objects (`generators.is_generator`).
    """

    def __init__(self, own: Iterable[object] = ()) -> None:
        self.own = tuple(own)
        self._cpu = torch.get_rng_state()
        initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._cuda = [torch.cuda.get_rng_state(d) for d in range(torch.cuda.device_count() if initialized else 0)]
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = numpy.random.get_state() if numpy is not None else None
        self._own = self._own_at_first = [generators.way_back(g) for g in self.own]

    def __enter__(self) -> RngState:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._own = self._own_at_first
        self.restore()

    def restore(self) -> None:
        """Set all generators back to this state."""
        torch.set_rng_state(self._cpu)
        for device, state in enumerate(self._cuda):
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        for bring in self._own:
            bring()

    def covers(self, other: RngState) -> bool:
        """Whether `restore` sets every generator that `other.restore` does."""
        numpy = self._numpy is not None or other._numpy is None
        return numpy and len(self._cuda) >= len(other._cuda) and {*map(id, self.own)} >= {*map(id, other.own)}

    def follow(self) -> None:
        """Take the caller's own generators as they are now for their state."""
        self._own = [generators.way_back(g) for g in self.own]

    def now(self) -> RngState:
        """What the same generators are at now."""
        return RngState(self.own)


@contextmanager
def frozen(params: Sequence[Tensor]) -> Iterator[None]:
    """Switch requires_grad off, so that no activation is stored and nothing is back-propagated for `params`."""
    try:
        for p in params:
            p.requires_grad_(False)
        yield
    finally:
        for p in params:
            p.requires_grad_(True)


class _FastAttention:
    """How many passes, in all threads, want torch's fast path of attention off; the first switches, the last back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._passes = 0
        self._was = True

    def hold_off(self) -> None:
        with self._lock:
            if self._passes == 0:
                self._was = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self._passes += 1

    def let_go(self) -> None:
        with self._lock:
            self._passes -= 1
            if self._passes == 0:
                torch.backends.mha.set_fastpath_enabled(self._was)


_fast_attention = _FastAttention()


@contextmanager
def no_fast_attention() -> Iterator[None]:
    """Without gradients torch's attention would take another path, whose outputs at padded positions are zeros."""
    _fast_attention.hold_off()
    try:
        yield
    finally:
        _fast_attention.let_go()
