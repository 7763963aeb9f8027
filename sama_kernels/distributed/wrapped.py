"""Models wrapped in DistributedDataParallel: kept quiet while a meta step calls them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def quiet(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block no DistributedDataParallel among `modules` reduces gradients or broadcasts buffers.

    Its reducer waits for hooks that fire in `.backward()` only; a meta step differentiates with `autograd.grad`, and
    without this the next forward pass raises, or the ranks wait for one another for ever.
    """
    wrapped = [m for m in modules if isinstance(m, DistributedDataParallel)]
    before = [(m.require_backward_grad_sync, m.require_forward_param_sync) for m in wrapped]
    try:
        for m in wrapped:
            if m.require_backward_grad_sync and m.reducer._rebuild_buckets():
                # Its one collective outside of backward passes, in the second forward pass; here, where no closure of
                # another rank can have raised before it.
                m._has_rebuilt_buckets = True
            m.require_backward_grad_sync = False
            m.require_forward_param_sync = False
        yield
    finally:
        for m, (backward, forward) in zip(wrapped, before, strict=True):
            m.require_backward_grad_sync, m.require_forward_param_sync = backward, forward
