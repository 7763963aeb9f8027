"""`unhooked`: tensors whose hooks rest while a meta step differentiates with respect to them several times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

GRADIENT = "_backward_hooks"
"""Hooks of `register_hook`: they get the gradient, and may replace it."""
ACCUMULATED = "_post_accumulate_grad_hooks"
"""Hooks of `register_post_accumulate_grad_hook`: after `.grad` has changed; some make the optimizer's step."""


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
