"""Several processes: gradients in buckets, reduced while the backward pass runs (paper, section 3.3)."""

from sama_kernels.distributed.exchange import Exchange

__all__ = ["Exchange"]
