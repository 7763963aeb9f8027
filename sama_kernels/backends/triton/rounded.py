"""Square root and division with the rounding of IEEE 754, which Triton's own have for float64 only."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sqrt(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def divide(a, b):
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b
