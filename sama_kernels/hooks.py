"""`unhooked`: tensors whose hooks rest while a meta step differentiates with respect to them several times; and
`hooked`: those hooks by hand, where other tensors stand in the places of theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

GRADIENT = "_backward_hooks"
"""Hooks of `register_hook`: they get the gradient, and may replace it."""
ACCUMULATED = "_post_accumulate_grad_hooks"
"""Hooks of `register_post_accumulate_grad_hook`: after `.grad` has changed; some make the optimizer's step."""

Hooks = Sequence[Sequence[Callable[[Tensor], Any]]]
"""The gradient hooks of several tensors."""


@contextmanager
def unhooked(tensors: Sequence[Tensor], kind: str = GRADIENT) -> Iterator[None]:
    """Within the block no hook of this kind fires that the tensors had before it, and `retain_grad()` retains nothing.

    Autograd refers to the dict that holds a tensor's hooks, so they are taken out of it, whoever else has it.
    """
    dicts = [hooks for x in tensors if (hooks := getattr(x, kind))]
    before = [dict(hooks) for hooks in dicts]
    retained = [(x, x.grad) for x in tensors if x.retains_grad]
    try:
        for hooks in dicts:
            hooks.clear()
        yield
    finally:
        for hooks, own in zip(dicts, before, strict=True):
            own.update(hooks)  # those that were added meanwhile come last
            hooks.clear()
            hooks.update(own)
        for x, grad in retained:
            x.grad = grad


def gradient_hooks(x: Tensor) -> list[Callable[[Tensor], Any]]:
    """The hooks of `register_hook`, in the order in which they fire."""
    hooks: dict[int, Callable[[Tensor], Any]] | None = getattr(x, GRADIENT)
    return list(hooks.values()) if hooks else []


def hooked(hooks: Sequence[Callable[[Tensor], Any]], grad: Tensor | None) -> Tensor | None:
    """The gradient as these hooks make it."""
    if grad is None:
        return None
    for hook in hooks:
        other = hook(grad)
        grad = grad if other is None else other
    return grad
