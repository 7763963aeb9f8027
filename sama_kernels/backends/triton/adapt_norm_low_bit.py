"""adapt_norm_low_bit_adam: v <- D d and ||v||^2 in one pass. See sama_kernels/ops/adapt_norm_low_bit.py.

The arithmetic is that of csrc/common/low_bit.h, operation by operation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sama_kernels.backends import low_bit
from sama_kernels.backends.arguments import EXACT
from sama_kernels.backends.triton.adapt_norm import (
    adam_element,
    adam_scalars,
    bias_corrections,
    corrections_of,
    host_part,
    log2,
    steps_on_device,
)
from sama_kernels.backends.triton.chunks import (
    ADDRESSES,
    in_chunk,
    load,
    load_words,
    locate,
    partial_sums,
    store_words,
    words_at,
)
from sama_kernels.backends.triton.launch import OPTIONS, launch, new_slots, total
from sama_kernels.backends.triton.storage import compute_type, narrow
from sama_kernels.backends.triton.tables import Operands
from sama_kernels.upload import upload

M_CODES, W_CODES, M_SCALES, W_SCALES, M_TABLE, W_TABLE, STEP = (tl.constexpr(2 + i) for i in range(7))
"""Operands after v and the gradient."""


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
    block_size: int,
    lr_tensor: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    mode: int,
) -> Tensor:
    """See `sama_kernels.ops.adapt_norm_low_bit_adam`."""
    exp_avgs = (exp_avg_codes, exp_avg_scales, exp_avg_tables)
    exp_avg_sqs = (exp_avg_sq_codes, exp_avg_sq_scales, exp_avg_sq_tables)
    low_bit.check_adapt_norm_low_bit_adam(v, grads, exp_avgs, exp_avg_sqs, steps, block_size, lr_tensor, mode)
    device = v[0].device
    codes = {"exp_avg_codes": exp_avg_codes, "exp_avg_sq_codes": exp_avg_sq_codes}
    others = {
        "exp_avg_scales": exp_avg_scales,
        "exp_avg_sq_scales": exp_avg_sq_scales,
        "exp_avg_tables": exp_avg_tables,
        "exp_avg_sq_tables": exp_avg_sq_tables,
    }
    device_steps = steps_on_device(steps, device)
    operands = Operands(
        "adapt_norm_low_bit_adam", {"v": v, "grads": grads}, ("v",), codes=codes, others={**others, **device_steps}
    )
    corrections = None if device_steps else upload(bias_corrections(steps, beta1, beta2), device)
    lr, lr_tensor = host_part(lr_tensor, lr, device)
    packed = exp_avg_tables[0].numel() == low_bit.PACKED_CODES
    slots = new_slots(operands.programs, device)
    first = 0
    for group in operands.groups:
        compute = torch.float64 if group.dtypes[0] == torch.float64 else torch.float32
        noise = 8 * torch.finfo(compute).eps * (1 - beta1)
        # Told nothing, ptxas presses these into 96 registers and spills two to four of them.
        pressed = packed and (compute == torch.float64 or not group.aligned)
        registers = {"maxnreg": 128} if pressed else {}
        launch(
            low_bit_adam_kernel, group, slots[0, first:], corrections, lr_tensor, lr, 1 - beta1, 1 - beta2,
            log2(beta1), log2(beta2), eps, noise,
            EXACT=mode == EXACT, PACKED=packed, PER_SCALE=block_size, **registers,
        )  # fmt: skip
        first += group.programs
    operands.copy_back()
    return total(slots)


@triton.constexpr_function
def of_a_thread(block):
    """Elements of a block that a thread has, next to each other as the codes are a byte each: 8, with float64 4."""
    return block // (32 * OPTIONS["num_warps"])


@triton.jit(do_not_specialize=["chunks", "rows", "slots", "corrections", "lr_tensor"])
def low_bit_adam_kernel(
    chunks, rows, slots, corrections, lr_tensor, lr: tl.float64, one_minus_beta1: tl.float64,
    one_minus_beta2: tl.float64, log2_beta1: tl.float64, log2_beta2: tl.float64, eps: tl.float64, noise: tl.float64,
    EXACT: tl.constexpr, PACKED: tl.constexpr, PER_SCALE: tl.constexpr, STORAGE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """v <- D d, and this program's part of ||v||^2 into its slot. Operands: v, g, then as numbered above."""
    STEPS: tl.constexpr = corrections is None  # step counters on the device
    row, start, length = locate(chunks, rows, STEP + STEPS, BLOCK * BLOCKS)
    v = words_at(row, 0, start, STORAGE[0], ALIGNED)
    g = words_at(row, 1, start, STORAGE[1], ALIGNED)
    c1, c2, t = corrections_of(row, corrections, log2_beta1, log2_beta2, STEP, STORAGE)
    scalars = adam_scalars(
        c1, c2, lr_tensor, lr, one_minus_beta1, one_minus_beta2, eps, 0.0, noise, compute_type(STORAGE[0])
    )
    known = t == 1.0
    in_bytes = start // 2 if PACKED else start
    m = (
        words_at(row, M_CODES, in_bytes, STORAGE[M_CODES], ALIGNED), _floats_at(row, M_SCALES), _floats_at(row, M_TABLE)
    )  # fmt: skip
    w = (
        words_at(row, W_CODES, in_bytes, STORAGE[W_CODES], ALIGNED), _floats_at(row, W_SCALES), _floats_at(row, W_TABLE)
    )  # fmt: skip
    total = tl.zeros((BLOCK // of_a_thread(BLOCK),), dtype=tl.float64)
    full = length // BLOCK
    for i in range(full):
        total += _low_bit_block(
            v, g, m, w, start, i * BLOCK, length, known, scalars, EXACT, PACKED, PER_SCALE, STORAGE, BLOCK, False
        )
    if full * BLOCK < length:
        total += _low_bit_block(
            v, g, m, w, start, full * BLOCK, length, known, scalars, EXACT, PACKED, PER_SCALE, STORAGE, BLOCK, True
        )
    tl.store(slots + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _floats_at(row, operand: tl.constexpr):
    return tl.load(row + ADDRESSES + operand).to(tl.pointer_type(tl.float32))


@triton.jit
def _low_bit_block(
    v, g, m, w, start, first, length, known, scalars, EXACT: tl.constexpr, PACKED: tl.constexpr,
    PER_SCALE: tl.constexpr, STORAGE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of v; returns sums of the squares of its values, float64."""
    COMPUTE: tl.constexpr = compute_type(STORAGE[0])
    d = load(v, first, length, STORAGE[0], COMPUTE, BLOCK, MASKED)
    gradient = load(g, first, length, STORAGE[1], COMPUTE, BLOCK, MASKED)
    mean = _dequantised(m, start, first, length, PACKED, PER_SCALE, BLOCK, MASKED).to(COMPUTE)
    own = _dequantised(w, start, first, length, PACKED, PER_SCALE, BLOCK, MASKED).to(COMPUTE)
    _, _, _, _, one_minus_beta1, one_minus_beta2, _, _, _ = scalars
    added = one_minus_beta2 * (gradient * gradient)
    own = tl.where((own >= added) | (own != own), own, added)  # NaN stays
    own = tl.where(known, added, own)
    mean = tl.where(known, one_minus_beta1 * gradient, mean)
    adapted = adam_element(d, gradient, mean, own, own, d, scalars, EXACT, False, False, False, BLOCK)
    store_words(v, first, length, narrow(adapted, STORAGE[0]), BLOCK, MASKED)
    wide = in_chunk(adapted.to(tl.float64), first, length, BLOCK, MASKED)
    return partial_sums(wide * wide, of_a_thread(BLOCK))


@triton.jit
def _dequantised(
    stored, start, first, length, PACKED: tl.constexpr, PER_SCALE: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """A block of a moment, float32."""
    words, scales, table = stored
    if PACKED:
        pairs = load_words(words, first // 2, (length + 1) // 2, BLOCK // 2, MASKED)
        upper, lower = (pairs >> 4).to(tl.int32), (pairs & 15).to(tl.int32)
        values = tl.interleave(tl.load(table + upper), tl.load(table + lower))
    else:
        values = tl.load(table + load_words(words, first, length, BLOCK, MASKED).to(tl.int32))
    OWN: tl.constexpr = of_a_thread(BLOCK)
    if PER_SCALE % OWN == 0:  # one scale for all that a thread has
        at = first + tl.arange(0, BLOCK // OWN) * OWN
        few = _scales_of(scales, start, at, length, PER_SCALE, MASKED)
        scale = tl.reshape(tl.broadcast_to(few[:, None], (BLOCK // OWN, OWN)), (BLOCK,))
    else:
        scale = _scales_of(scales, start, first + tl.arange(0, BLOCK), length, PER_SCALE, MASKED)
    return values * scale


@triton.jit
def _scales_of(scales, start, at, length, PER_SCALE: tl.constexpr, MASKED: tl.constexpr):
    """The scales of elements `at` of the chunk that begins with element `start` of the tensor."""
    block = (start + at) // PER_SCALE
    if MASKED:
        return tl.load(scales + block, mask=at < length, other=0.0)
    else:
        return tl.load(scales + block)
