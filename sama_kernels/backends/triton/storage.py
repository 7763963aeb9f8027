"""How a stored word becomes a number and back (see csrc/common/dtypes.h, which does the same for C++).

Words are loaded as unsigned integers: perturb and restore need the bits anyway, and bfloat16 as a type of its own is
avoided because the interpreter computes with it wrongly. Turning a word into a float of the same width is free.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LANGUAGE_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int64: tl.int64,
    torch.int32: tl.int32,
    torch.uint8: tl.uint8,
}


@triton.constexpr_function
def word_type(storage):
    """The unsigned integer as wide as `storage`."""
    return {8: tl.uint8, 16: tl.uint16, 32: tl.uint32, 64: tl.uint64}[storage.primitive_bitwidth]


@triton.constexpr_function
def compute_type(storage):
    """Where values of this dtype are added and multiplied."""
    return tl.float64 if storage == tl.float64 else tl.float32


@triton.jit
def widen(word, STORAGE: tl.constexpr, COMPUTE: tl.constexpr):
    """The number that a word stands for; exact but for float64 storage in a float32 computation."""
    if STORAGE == tl.bfloat16:
        value = (word.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        value = word.to(STORAGE, bitcast=True)
    return value.to(COMPUTE)


@triton.jit
def narrow(value, STORAGE: tl.constexpr):
    """`value`, of the compute type of STORAGE, as a word: rounded to nearest, ties to even."""
    if STORAGE == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000  # rounding could turn it into Inf
        return tl.where(is_nan, 0x7FC0, rounded).to(tl.uint16)
    else:
        return value.to(STORAGE).to(word_type(STORAGE), bitcast=True)


@triton.jit
def narrow_stochastically(value, random, STORAGE: tl.constexpr):
    """float32 `value` as one of its two neighbours in bfloat16 or float16, such that the mean is exact.

    Away from zero if the 16 random bits, as a fraction, are less than what rounding towards zero would cut off.
    """
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if STORAGE == tl.bfloat16:
        return tl.where(magnitude > 0x7F800000, 0x7FC0, (bits + random) >> 16).to(tl.uint16)
    else:
        sign = (bits >> 16) & 0x8000
        normal = (magnitude - (112 << 23) + (random & 0x1FFF)) >> 13
        is_denormal = magnitude < 0x38800000  # 2^-14
        in_units = tl.where(is_denormal, magnitude, 0).to(tl.float32, bitcast=True) * 16777216.0  # of 2^-24
        whole = in_units.to(tl.int32)
        up = random.to(tl.float32) < (in_units - whole.to(tl.float32)) * 65536.0
        denormal = (whole + up.to(tl.int32)).to(tl.uint32)
        special = tl.where(magnitude > 0x7F800000, 0x7E00, 0x7C00)  # NaN, or too large
        finite = tl.where(is_denormal, denormal, normal)
        return (sign | tl.where(magnitude >= 0x47800000, special, finite)).to(tl.uint16)
