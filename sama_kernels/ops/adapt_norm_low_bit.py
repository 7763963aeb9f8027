"""`adapt_norm_low_bit_adam`: v <- D d and ||v||^2 for Adam whose moments are stored in a few bits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from torch import Tensor

from sama_kernels import backends
from sama_kernels.backends import reference
from sama_kernels.ops._library import define, fake_norm_sq, refuse_gradients, written
from sama_kernels.upload import refuse_captured


def adapt_norm_low_bit_adam(
    v: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_codes: Sequence[Tensor],
    exp_avg_scales: Sequence[Tensor],
    exp_avg_tables: Sequence[Tensor],
    exp_avg_sq_codes: Sequence[Tensor],
    exp_avg_sq_scales: Sequence[Tensor],
    exp_avg_sq_tables: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    block_size: int,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    mode: int,
    backend: str,
) -> Tensor:
    """v <- D d, where D is that of `adapt_norm_adam` without coupled decay, from moments quantised in blocks.

    The optimizer computed u from m and w in float32 and stored them rounded: element i, numbered in row-major order, as
    table[code i] * scales[i // block_size], a product in float32 (Dettmers et al., 2022, "8-bit optimizers via
    block-wise quantization"). They are dequantised where they are used, and what is known exactly is put right: at the
    first step m = (1 - beta1) g and w = (1 - beta2) g^2; at later ones w was no smaller than (1 - beta2) g^2, which
    the step added to it, and a stored w below that (often 0, where one cell of a block is far larger) is quantisation
    error.

    Arguments:
        v: the direct gradients d, overwritten with D d. Any float dtype; any shapes and strides, also empty.
        grads: g of the step, shaped like v; dtypes may differ from v's.
        exp_avg_codes, exp_avg_sq_codes: uint8, contiguous, of any shape: a byte for each element of v, or one for two,
            the first of them in the upper four bits. (float8 seen as uint8, with all its values as the table.)
        exp_avg_scales, exp_avg_sq_scales: float32, contiguous, one for each block of `block_size` elements; the last
            block of a tensor may be shorter.
        exp_avg_tables, exp_avg_sq_tables: float32, contiguous, 256 entries, or 16 if a byte holds two codes; all alike.
        steps: the step counters t after the step, 0-dim, on the CPU or on v's device.
        block_size: 1 to 2^30; multiples of 8 are faster on a GPU.
        lr: of the step; a 0-dim tensor is read on its device.
        mode: `reference.PAPER` or `reference.EXACT`.
    Returns:
        ||v||^2 over the list, float64, 0-dim, on v's device, of the values before they are rounded to v's dtype; summed
        in a fixed order.
    Bytes moved per float32 element: 10 read + 4 written (4-bit codes: 9 + 4), and the scales.
    """
    lr_tensor, lr_float = (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)
    lr_tensors = () if lr_tensor is None else (lr_tensor,)
    refuse_captured(chain(steps, lr_tensors), v)
    refuse_gradients("adapt_norm_low_bit_adam", v=v, grads=grads, lr=lr_tensors)
    kernel = backends.kernel("adapt_norm_low_bit_adam", backend)
    norm_sq: Tensor = kernel(
        v, grads, exp_avg_codes, exp_avg_scales, exp_avg_tables, exp_avg_sq_codes, exp_avg_sq_scales,
        exp_avg_sq_tables, steps, block_size, lr_tensor, lr_float, beta1, beta2, eps, mode,
    )  # fmt: skip
    written(v)
    return norm_sq


define(
    "adapt_norm_low_bit_adam(Tensor(a!)[] v, Tensor[] grads, Tensor[] exp_avg_codes, Tensor[] exp_avg_scales,"
    " Tensor[] exp_avg_tables, Tensor[] exp_avg_sq_codes, Tensor[] exp_avg_sq_scales, Tensor[] exp_avg_sq_tables,"
    " Tensor[] steps, int block_size, Tensor? lr_tensor, float lr, float beta1, float beta2, float eps, int variant)"
    " -> Tensor",
    reference=reference.adapt_norm_low_bit_adam,
    fake=fake_norm_sq,
)
