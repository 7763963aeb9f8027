"""Stochastic rounding in plain PyTorch: which random bits belong to which element, and what is done with them.

The random numbers are a function of (seed, tensor, element) alone, by the counter-based generator Philox4x32-10
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). Every backend makes the same ones, however it
divides the work, and no generator of torch's is touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sama_kernels.backends.arguments import share_dense_layout

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32: four 32-bit words per counter, all held in int64.

    Arguments:
        seed: 64 bits, the key (low word first).
        counter: its four 32-bit words, lowest first, int64 tensors of one shape.
    """
    c0, c1, c2, c3 = counter
    keys = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # int64 wraps around: all 64 bits are right
        high0, high1 = (product0 >> 32) & _MASK, (product1 >> 32) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ keys[0], product1 & _MASK, high0 ^ c3 ^ keys[1], product0 & _MASK
        keys = [(key + step) & _MASK for key, step in zip(keys, _KEY_STEPS, strict=True)]
    return c0, c1, c2, c3


def random_halfwords(seed: int, tensor: int, numel: int, device: torch.device) -> Tensor:
    """16 random bits for each element of the `tensor`-th tensor of a list, int64, shape (numel,).

    Element i takes half-word i mod 8 (of each word the low half first) of the block with the counter
    (i // 8 low, i // 8 high, tensor, 0).
    """
    blocks = torch.arange((numel + 7) // 8, dtype=torch.int64, device=device)
    zero = torch.zeros_like(blocks)
    words = torch.stack(philox(seed, (blocks & _MASK, blocks >> 32, zero + tensor, zero)), dim=1)
    return torch.stack([words & 0xFFFF, words >> 16], dim=2).flatten()[:numel]


def random_like(x: Tensor, other: Tensor, seed: int, tensor: int) -> Tensor:
    """`random_halfwords` in the shape of `x`.

    Elements are numbered in memory order if `x` and `other` share one layout without holes, else in row-major order.
    """
    random = random_halfwords(seed, tensor, x.numel(), x.device)
    if share_dense_layout([x, other]):
        return random.as_strided(x.shape, x.stride())
    return random.view(x.shape)


def round_stochastically(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """float32 `x` to one of its two neighbours in `dtype`, up with the probability that makes the mean exact.

    Arguments:
        dtype: bfloat16 or float16; any other dtype is wide enough and is rounded to nearest.
        random: 16 random bits per element, int64. In float16's denormal range the probability is a multiple of 2^-16.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return x.to(dtype)
    word = x.view(torch.int32).to(torch.int64) & _MASK
    sign, magnitude = word & 0x80000000, word & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded = (magnitude + random) >> 16
    else:
        normal = (magnitude - (112 << 23) + (random & 0x1FFF)) >> 13
        in_units = magnitude.to(torch.int32).view(torch.float32) * 2.0**24  # of the smallest denormal
        whole = in_units.floor()
        denormal = whole.to(torch.int64) + (random < (in_units - whole) * 65536)
        rounded = torch.where(magnitude < 0x38800000, denormal, normal).clamp(max=0x7C00)  # 2^-14 and Inf
    word = (sign >> 16) | rounded
    signed = torch.where(word >= 0x8000, word - 0x10000, word).to(torch.int16)
    return torch.where(x.isfinite(), signed.view(dtype), x.to(dtype))
