"""Which collectives this process launches: our own, FSDP's, tensor parallelism's, those of closures and compiled code.

All of them are ops of c10d, and pass torch's dispatcher, wherever they come from: Python, C++, autograd's threads. Our
kernels stand there before the backends', note each call while a `Record` is open, and go on to the backend. What is not
seen: a captured graph that is replayed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_ALIKE = (  # all members make the same call, with tensors of the same shapes
    *("allreduce_", "allreduce_coalesced_", "reduce_", "broadcast_", "barrier", "alltoall_base_"),
    *("_allgather_base_", "allgather_", "allgather_coalesced_", "allgather_into_tensor_coalesced_"),
    *("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_"),
)
_UNLIKE = (  # what a member passes depends on which one it is
    *("gather_", "scatter_", "alltoall_", "monitored_barrier_", "send", "recv_", "recv_any_source_"),
)
_GROUP, _OPERATION = (f"__torch__.torch.classes.c10d.{name}" for name in ("ProcessGroup", "ReduceOp"))
_KEY = torch._C.DispatchKey.BackendSelect  # above every device's kernels, below autograd, which functional ones leave


class Call(NamedTuple):
    """A collective that was launched: its name, its group, and its arguments as `_described`."""

    name: str
    group: Any
    arguments: list[Any]


class Record:
    """The collectives that this process launches, in order.

    Those of threads that Python code has started are not in it, such as a checkpoint that is written meanwhile.
    """

    def __init__(self) -> None:
        _listen()
        self.calls: list[Call] = []
        self._thread = threading.get_ident()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Note what is launched in this block."""
        _open.append(self)
        try:
            yield
        finally:
            _open.remove(self)

    def note(self, name: str, at: int, arguments: tuple[Any, ...]) -> None:
        """A call is being made; `at`: which argument is the group."""
        if threading.get_ident() == self._thread or isinstance(threading.current_thread(), threading._DummyThread):
            described = [None if i == at else _described(x) for i, x in enumerate(arguments)]
            self.calls.append(Call(name, dist.ProcessGroup.unbox(arguments[at]), described))


def alike(name: str, arguments: list[Any]) -> bool:
    """Whether every member of the group makes this very call, so that one can be made in another's place."""
    if name == "alltoall_base_":
        return all(len(set(splits)) <= 1 for splits in (arguments[3], arguments[4]))
    if name in ("allgather_", "reduce_scatter_"):
        lists = arguments[0] if name == "allgather_" else arguments[1]
        return all(part == parts[0] for parts in lists for part in parts)
    return name in _ALIKE


def call(name: str, group: Any, arguments: list[Any], device: torch.device) -> tuple[dist.Work, list[Any]]:
    """Make a collective that another member of `group` has `_described`, with zeros.

    Arguments:
        device: this rank's, among those of its kind.
    Returns: what to wait for, and what is to be kept until then.
    """
    op, at = _op(name)
    made: list[Any] = [_made(x, device) for x in arguments]
    made[at] = group.boxed()
    for i, argument in enumerate(op._schema.arguments[: len(made)]):
        if str(argument.type) == _OPERATION:
            made[i] = torch.classes.c10d.ReduceOp()  # a sum: every member reduces for itself
    result = op(*made)
    work = result[-1] if isinstance(result, tuple) else result
    return dist.Work.unbox(work), made


def _described(value: Any) -> Any:
    """In JSON: a tensor by its shape, dtype and kind of device; a group or an operation by nothing."""
    if isinstance(value, Tensor):
        return {"shape": tuple(value.shape), "dtype": str(value.dtype)[6:], "device": value.device.type}
    if isinstance(value, (list, tuple)):
        return [_described(x) for x in value]
    return value if isinstance(value, (bool, int)) else None


def _made(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        place = device if device.type == value["device"] else torch.device(value["device"])
        return torch.zeros(value["shape"], dtype=getattr(torch, value["dtype"]), device=place)
    return [_made(x, device) for x in value] if isinstance(value, list) else value


_open: list[Record] = []


@cache
def _listen() -> Any:
    """From now on, for as long as the process lives, as threads may be in an op that is registered anew. It costs the
    host 11 us for each collective, and 23 while a record is open (torch's fake backend, Intel Xeon, 2.8 GHz)."""
    library: Any = torch.library.Library("c10d", "IMPL")  # type: ignore[no-untyped-call]
    for name in (*_ALIKE, *_UNLIKE):
        op, at = _op(name)
        library.impl(name, partial(_noted, op, name, at), "BackendSelect", with_keyset=True)
    return library


def _noted(op: Any, name: str, at: int, keys: Any, *arguments: Any) -> Any:
    for record in _open:
        record.note(name, at, arguments)
    return op.redispatch(keys.remove(_KEY), *arguments)


@cache
def _op(name: str) -> tuple[Any, int]:
    op = getattr(torch.ops.c10d, name).default
    return op, [str(argument.type) for argument in op._schema.arguments].index(_GROUP)
