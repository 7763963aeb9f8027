"""`stop_gradient` and `@recorded`: detached values that stay at theta while theta is perturbed.

A finite difference does not see `.detach()`: evaluated at theta+-, a weight w(loss.detach(); lambda) moves with the
loss, although the base gradient never flowed through it. So in the perturbed passes `stop_gradient(x)` returns the
value that x had at theta. Those values come from a tape: the one that `@recorded` made in the last ordinary call, or
one more evaluation at theta ("centre").
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils.weak import WeakIdKeyDictionary

from sama_kernels.guards import RngState
from sama_kernels.learned import Learned
from sama_kernels.reach import reachable
from sama_kernels.types import Closure


class Tape:
    """The values that one evaluation of a closure passed to `stop_gradient`, in call order, and where its RNG began."""

    def __init__(self, rng: RngState | None = None, copy: bool = False) -> None:
        self.rng = rng
        self._copy = copy
        self._values: list[tuple[Tensor, int]] = []
        self._next = 0

    def record(self, x: Tensor) -> Tensor:
        """`x` detached, remembered."""
        value = x.detach().clone() if self._copy else x.detach()
        _held[value] = True
        self._values.append((value, value._version))
        return value

    def replay(self, x: Tensor) -> Tensor:
        """The value remembered for this call; `x` must look like it."""
        if self._next >= len(self._values):
            raise RuntimeError(
                f"stop_gradient: called more often in a perturbed pass than at theta ({len(self._values)} times);"
                " base_loss must take the same path every time it is called"
            )
        value, _ = self._values[self._next]
        self._next += 1
        if (value.shape, value.dtype, value.device) != (x.shape, x.dtype, x.device):
            raise RuntimeError(
                f"stop_gradient: call {self._next} got {tuple(x.shape)} {x.dtype} on {x.device}, but the value at theta"
                f" is {tuple(value.shape)} {value.dtype} on {value.device}; base_loss must see the same batch as in its"
                ' last ordinary call (or pass hold="center")'
            )
        return value

    def recall(self, x: Tensor) -> Tensor:
        """The value for a call of `stop_gradient` that backward repeats (activation checkpointing), in any order."""
        if len(self._values) != 1:
            raise RuntimeError(
                f"stop_gradient: base_loss calls it {len(self._values)} times, also in a checkpointed region, and when"
                " backward computes that again there is no telling which of these calls it is; call it outside"
                " torch.utils.checkpoint (base_loss may return what the region makes of its value)"
            )
        self.rewind()
        return self.replay(x)

    def is_empty(self) -> bool:
        """Whether `stop_gradient` was never called."""
        return not self._values

    def intact(self) -> bool:
        """Whether no remembered value has been changed in place since."""
        return all(value._version == version for value, version in self._values)

    def rewind(self) -> None:
        """Back to the first value, for the next pass."""
        self._next = 0

    def check_used_up(self) -> None:
        """Raise unless the pass asked for every value, and left them as they were."""
        if self._next != len(self._values):
            raise RuntimeError(
                f"stop_gradient: called {self._next} times in a perturbed pass, but {len(self._values)} times at theta;"
                " base_loss must take the same path every time it is called"
            )
        if not self.intact():
            raise RuntimeError("stop_gradient: its result was changed in place by base_loss; work on a copy (.clone())")


class NeedsCentre(Exception):
    """A perturbed pass asked for a value at theta and there is no tape; `passes` catches it, users never see it."""


# Outside every compiled graph: a trace would freeze what the session of its first call said. This is
# torch.compiler.disable, but torch._dynamo is imported at the first call (it takes 1.3 seconds).
_never_compiled = _disable_dynamo


class _Session(threading.local):
    """What `stop_gradient` does on this thread; None in an ordinary call."""

    handler: Callable[[Tensor], Tensor] | None = None


_session = _Session()
# By the thread whose pass it is. On a GPU backward has a thread of its own, which takes the last.
_in_backward: list[tuple[int, Callable[[Tensor], Tensor]]] = []
_asks = Learned()
_held = WeakIdKeyDictionary()
_draws_by_itself = (
    WeakIdKeyDictionary()
)  # code -> whether it reached generators of the caller's own when last looked at


@_never_compiled
def stop_gradient(x: Tensor) -> Tensor:
    """`x.detach()`, held at its value at theta in the perturbed passes of a meta step.

    Use it wherever a base loss detaches something that depends on the base parameters, e.g. the input of a weight
    net: ``weights = net(sk.stop_gradient(losses))``.

    Arguments:
        x: any tensor. Returns: a tensor of the same shape, dtype and device without a gradient.
    Raises:
        RuntimeError: in a perturbed pass, if the calls do not match those at theta in number, shape, dtype or device.
    Inside a function given to torch.compile it breaks the graph (so `fullgraph=True` is not possible for that
    function; it is for the model that it calls): what it returns is decided call by call.
    Source: the base gradient g(theta, lambda) of Eq. 4 in the paper holds such values fixed; Eq. 5 has to do the same.
    """
    handler = _session.handler
    if handler is None and _in_backward and torch._C._current_graph_task_id() != -1:  # this thread runs backward
        own = [answer for thread, answer in _in_backward if thread == threading.get_ident()]
        handler = own[-1] if own else _in_backward[-1][1]
    return x.detach() if handler is None else handler(x)


def recorded(closure: Closure) -> Closure:
    """Decorator for `base_loss`: keeps what `stop_gradient` saw, so that the meta step needs no extra forward.

    Every ordinary call starts a fresh tape, owned by the closure; a meta step with ``hold="auto"`` holds the values
    of the last ordinary call (which the base step on the same batch has just made) and replays its random numbers.
    Without the decorator they come from one more evaluation at theta. Values and generator states are kept
    until the next ordinary call, or as long as the closure itself (without their graph: they are detached).

    With torch.compile write ``recorded(torch.compile(f))``. The other way round the recording is not compiled, nor is
    `f`; models that `f` calls are if they were compiled themselves.
    """
    recording = Recording(closure)

    @functools.wraps(closure, updated=())  # without torch.compile's marks on `closure`, which are not the wrapper's
    def wrapper() -> Tensor:
        return recording.call()

    wrapper.recording = recording  # type: ignore[attr-defined]
    return wrapper


class Recording:
    """A `@recorded` closure and its last tape."""

    def __init__(self, closure: Closure) -> None:
        self._closure = closure
        self.tape: Tape | None = None

    @_never_compiled
    def call(self) -> Tensor:
        """Evaluate the closure; an ordinary call is taped."""
        if _session.handler is not None:  # inside a pass or another recording, which has its own tape
            return self._closure()
        self.tape = None
        tape = Tape(RngState(_generators(self._closure)))
        with handling(tape.record):
            loss = self._closure()
        if not tape.is_empty():
            remember(self._closure)
        self.tape = tape
        return loss


def tape_of(closure: Closure, generators: Sequence[object] = ()) -> Tape | None:
    """The tape of the last ordinary call of a `@recorded` closure, if it can still be used.

    `generators`: all that the closures of the meta step reach. If this one reaches some of which the tape does not know
    where they began, it cannot.
    """
    recording = getattr(closure, "recording", None)
    tape = recording.tape if isinstance(recording, Recording) else None
    if tape is None or not tape.intact():
        return None
    if generators and tape.rng is not None:
        known = {*map(id, tape.rng.own)}
        if any(id(g) not in known for g in _generators(closure, look=True)):
            return None
    return tape


def _generators(closure: Closure, look: bool = False) -> tuple[object, ...]:
    """The generators of the caller's own that a closure reaches. Code that had none is not searched (0.02 to 3 ms)
    again, unless told to `look`: a meta step, which searches anyway, does where it finds any."""
    code = code_of(closure)
    if not look and code is not None and code in _draws_by_itself and not _draws_by_itself[code]:
        return ()
    found = tuple(reachable((closure,)).generators)
    if code is not None:
        _draws_by_itself[code] = bool(found)
    return found


@contextmanager
def handling(handler: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `handler` answer `stop_gradient` on this thread."""
    previous, _session.handler = _session.handler, handler
    try:
        yield
    finally:
        _session.handler = previous


@contextmanager
def recomputing(handler: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let `handler` answer `stop_gradient` where a backward pass, on any thread, computes activations again."""
    entry = (threading.get_ident(), handler)
    _in_backward.append(entry)
    try:
        yield
    finally:
        _in_backward.remove(entry)


def is_held(value: Tensor) -> bool:
    """Whether a tape has recorded this very tensor: it was detached, but the perturbed passes do not move it."""
    return value in _held


def refuse(_: Tensor) -> Tensor:
    """Handler for a pass without a tape."""
    raise NeedsCentre


def remember(closure: Closure) -> None:
    """Note that `closure` calls `stop_gradient`, to spare the next meta step finding out."""
    if (code := code_of(closure)) is not None:
        _asks.note(code)


def is_known_to_ask(closure: Closure) -> bool:
    """Whether an earlier meta step saw this closure's code call `stop_gradient`. A hint, never relied upon."""
    return (code := code_of(closure)) is not None and _asks.knows(code)


def code_of(closure: Closure) -> CodeType | None:
    """The code object of a closure: the same one for the closures that a training loop makes anew every step."""
    while (inner := getattr(closure, "__wrapped__", None) or _partial_of(closure)) is not None:
        closure = inner
    return getattr(closure, "__code__", None)


def _partial_of(closure: Closure) -> Closure | None:
    return closure.func if isinstance(closure, functools.partial) else None
