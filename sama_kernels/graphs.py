"""autograd's graph of a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def nodes(roots: Iterable[Tensor]) -> Iterator[Any]:
    """All nodes that a backward pass from `roots` may reach, each once."""
    return nodes_from(root.grad_fn for root in roots if root.grad_fn is not None)


def nodes_from(starts: Iterable[Any]) -> Iterator[Any]:
    """Those nodes, and all that a backward pass may reach from them, each once."""
    waiting = list(dict.fromkeys(starts))
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        new = {f for f, _ in node.next_functions if f is not None} - seen
        seen |= new
        waiting += new
