"""autograd's graph of a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def nodes(roots: Iterable[Tensor]) -> Iterator[Any]:
    """All nodes that a backward pass from `roots` may reach, each once."""
    waiting: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        new = {f for f, _ in node.next_functions if f is not None} - seen
        seen |= new
        waiting += new
