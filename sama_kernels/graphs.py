"""autograd's graph of a tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def nodes(roots: Iterable[Tensor], until: Iterable[Tensor] = ()) -> Iterator[Any]:
    """All nodes that a backward pass from `roots` may reach without going through the tensors `until`, each once."""
    return nodes_from(
        (root.grad_fn for root in roots if root.grad_fn is not None),
        (x.grad_fn for x in until if x.grad_fn is not None),
    )


def nodes_from(starts: Iterable[Any], until: Iterable[Any] = ()) -> Iterator[Any]:
    """Those nodes, and all that a backward pass may reach from them without going through `until`, each once."""
    waiting = list(dict.fromkeys(starts))
    seen = {*waiting, *until}
    while waiting:
        node = waiting.pop()
        yield node
        new = {f for f, _ in node.next_functions if f is not None} - seen
        seen |= new
        waiting += new


def is_once_differentiable(gradients: Iterable[Tensor], until: Iterable[Tensor] = ()) -> bool:
    """Whether an autograd.Function that is `once_differentiable` had a part in these gradients; the graph lacks it."""
    return any(node.name() == "torch::autograd::Error" for node in nodes(gradients, until))
