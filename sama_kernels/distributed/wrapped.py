"""Models wrapped in DistributedDataParallel: kept quiet while a meta step calls them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sama_kernels.trees import instances


@contextmanager
def quiet(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block no DistributedDataParallel among `modules` reduces gradients, broadcasts buffers or rearranges
    its buckets.

    Its reducer waits for hooks that fire in `.backward()` only; a meta step differentiates with `autograd.grad`, and
    without this the next forward pass raises, or the ranks wait for one another for ever.
    """
    wrapped = instances(modules, DistributedDataParallel)
    before = [(m.require_backward_grad_sync, m.require_forward_param_sync, m.reducer) for m in wrapped]
    try:
        for m in wrapped:
            m.require_backward_grad_sync = False
            m.require_forward_param_sync = False
            m.reducer = _Resting(m.reducer)
        yield
    finally:
        for m, (backward, forward, reducer) in zip(wrapped, before, strict=True):
            m.require_backward_grad_sync, m.require_forward_param_sync, m.reducer = backward, forward, reducer


class _Resting:
    """A reducer that leaves its buckets as they are: the first forward pass after a backward pass rearranges them, with
    a collective, and under `gradient_as_bucket_view` gives every parameter another `.grad`."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def _rebuild_buckets(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)
