"""The element-wise ops of a meta step, one file each; every one takes the tensors of the whole model in one call.

They have no derivative: with tensors on which autograd records they raise RuntimeError.
"""

from sama_kernels.backends.arguments import COEFFICIENTS
from sama_kernels.backends.reference import (
    CENTERED,
    DELTA,
    EXACT,
    LINEAR,
    MAXIMUM,
    MINUS,
    NEAREST,
    PAPER,
    PLUS,
    RATIO,
    STOCHASTIC,
)
from sama_kernels.ops.adapt_norm import adapt_norm_adam, adapt_norm_scale
from sama_kernels.ops.adapt_norm_low_bit import adapt_norm_low_bit_adam
from sama_kernels.ops.adapt_norm_moments import adapt_norm_moments
from sama_kernels.ops.central_difference import central_difference
from sama_kernels.ops.perturb import perturb
from sama_kernels.ops.restore import restore
from sama_kernels.ops.step_size import step_size

__all__ = [
    "CENTERED",
    "COEFFICIENTS",
    "DELTA",
    "EXACT",
    "LINEAR",
    "MAXIMUM",
    "MINUS",
    "NEAREST",
    "PAPER",
    "PLUS",
    "RATIO",
    "STOCHASTIC",
    "adapt_norm_adam",
    "adapt_norm_low_bit_adam",
    "adapt_norm_moments",
    "adapt_norm_scale",
    "central_difference",
    "perturb",
    "restore",
    "step_size",
]
