"""Several processes: gradients in buckets, reduced while the backward pass runs (paper, section 3.3)."""

from sama_kernels.distributed.alone import Adapt, Alone
from sama_kernels.distributed.exchange import ranks_of
from sama_kernels.distributed.reduction import CommHook
from sama_kernels.distributed.wrapped import quiet

__all__ = ["Adapt", "Alone", "CommHook", "quiet", "ranks_of"]
