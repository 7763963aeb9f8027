"""What a meta step must leave as it found it: interrupts, random number generators, requires_grad flags."""

from __future__ import annotations

import random
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor


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
    another one than theta), Python's, NumPy's. `with RngState() as rng:` leaves them as it found them.
    """

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._cuda = [torch.cuda.get_rng_state(d) for d in range(torch.cuda.device_count() if initialized else 0)]
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")
        self._numpy = numpy.random.get_state() if numpy is not None else None

    def __enter__(self) -> RngState:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Set all generators back to this state."""
        torch.set_rng_state(self._cpu)
        for device, state in enumerate(self._cuda):
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


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
