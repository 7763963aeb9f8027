"""adapt_norm_moments: v <- D d and ||v||^2 in one pass. See sama_kernels/ops/adapt_norm_moments.py.

The arithmetic is that of csrc/common/moments.h, operation by operation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sama_kernels.backends import arguments
from sama_kernels.backends.triton.chunks import (
    INDEX,
    in_chunk,
    load,
    locate,
    one_access,
    partial_sums,
    store_words,
    words_at,
)
from sama_kernels.backends.triton.launch import launch, new_slots, total
from sama_kernels.backends.triton.rounded import divide, sqrt
from sama_kernels.backends.triton.storage import compute_type, narrow
from sama_kernels.backends.triton.tables import Operands

LINEAR, CENTERED = tl.constexpr(arguments.LINEAR), tl.constexpr(arguments.CENTERED)
MAXIMUM, DELTA = tl.constexpr(arguments.MAXIMUM), tl.constexpr(arguments.DELTA)
COEFFICIENTS = tl.constexpr(arguments.COEFFICIENTS)
HALLEY_STEPS = tl.constexpr(5)
NO_DECAY, IMPLICIT, BUFFER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Where theta before the step comes from, which the gradient contains: see csrc/common/moments.h."""


def adapt_norm_moments(
    v: Sequence[Tensor],
    grads: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    params: Sequence[Tensor],
    buffers: Sequence[Tensor],
    coefficients: Tensor,
    weight_decay: float,
    maximize: bool,
    form: int,
) -> Tensor:
    """See `sama_kernels.ops.adapt_norm_moments`."""
    lists = arguments.check_adapt_norm_moments(
        v, grads, firsts, seconds, params, buffers, coefficients, weight_decay, form
    )
    operands = Operands("adapt_norm_moments", lists, written=("v",))
    state = [i for i, name in enumerate(lists) if name in ("firsts", "seconds")]
    slots = new_slots(operands.programs, v[0].device)
    first = 0
    for group in operands.groups:
        own = torch.float64 if group.dtypes[0] == torch.float64 else torch.float32
        ulp = max(torch.finfo(dtype).eps for dtype in (own, *(group.dtypes[i] for i in state)))
        # Told nothing, ptxas presses some kernels into 80 or 96 registers (168 where tensors are not aligned) and
        # spills a few of them.
        registers = {"maxnreg": 128 if group.aligned else 224} if own == torch.float32 else {}
        launch(
            moments_kernel, group, slots[0, first:], coefficients.detach(), float(weight_decay), ulp,
            FORM=form, FIRSTS="firsts" in lists, DECAY=("params" in lists) + ("buffers" in lists),
            MAXIMIZE=bool(maximize), **registers,
        )  # fmt: skip
        first += group.programs
    operands.copy_back()
    return total(slots)


@triton.jit(do_not_specialize=["chunks", "rows", "slots", "coefficients"])
def moments_kernel(
    chunks, rows, slots, coefficients, weight_decay: tl.float64, ulp: tl.float64, FORM: tl.constexpr,
    FIRSTS: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr, STORAGE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """v <- D d, and this program's part of ||v||^2 into its slot. Operands: v, g, [m], w, [theta], [buffer]."""
    COUNT: tl.constexpr = 1 if FORM == LINEAR else 3 + FIRSTS + DECAY
    row, start, length = locate(chunks, rows, COUNT, BLOCK * BLOCKS)
    v = words_at(row, 0, start, STORAGE[0], ALIGNED)
    g, m, w, p, buffer = v, v, v, v, v  # not read unless
    if FORM != LINEAR:
        g = words_at(row, 1, start, STORAGE[1], ALIGNED)
        w = words_at(row, 2 + FIRSTS, start, STORAGE[2 + FIRSTS], ALIGNED)
    if FIRSTS:
        m = words_at(row, 2, start, STORAGE[2], ALIGNED)
    if DECAY != NO_DECAY:
        p = words_at(row, 3 + FIRSTS, start, STORAGE[3 + FIRSTS], ALIGNED)
    if DECAY == BUFFER:
        buffer = words_at(row, 4 + FIRSTS, start, STORAGE[4 + FIRSTS], ALIGNED)
    scalars = _scalars(coefficients + tl.load(row + INDEX) * COEFFICIENTS, weight_decay, ulp, DECAY, STORAGE)
    total = tl.zeros((BLOCK // one_access(STORAGE, COUNT),), dtype=tl.float64)
    full = length // BLOCK
    for i in range(full):
        total += _moments_block(
            v, g, m, w, p, buffer, i * BLOCK, length, scalars, FORM, FIRSTS, DECAY, MAXIMIZE, STORAGE, BLOCK, False
        )
    if full * BLOCK < length:
        total += _moments_block(
            v, g, m, w, p, buffer, full * BLOCK, length, scalars, FORM, FIRSTS, DECAY, MAXIMIZE, STORAGE, BLOCK, True
        )
    tl.store(slots + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _scalars(row, weight_decay, ulp, DECAY: tl.constexpr, STORAGE: tl.constexpr):
    """The numbers of one tensor in the compute type, computed in float64."""
    COMPUTE: tl.constexpr = compute_type(STORAGE[0])
    rate, a, b, slope = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    kappa, omega, eps, tail = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    decay = tl.full((), weight_decay, tl.float64)
    wide_ulp = tl.full((), ulp, tl.float64)
    closeness = wide_ulp if DECAY == NO_DECAY else wide_ulp * 2.0
    return (
        rate.to(COMPUTE),
        a.to(COMPUTE),
        b.to(COMPUTE),
        slope.to(COMPUTE),
        kappa.to(COMPUTE),
        omega.to(COMPUTE),
        eps.to(COMPUTE),
        (slope * tail).to(COMPUTE),
        (wide_ulp * 8.0 * tl.abs(slope)).to(COMPUTE),
        decay.to(COMPUTE),
        (decay * rate * a).to(COMPUTE),
        (decay * rate * b).to(COMPUTE),
        (1.0 / tl.sqrt(omega)).to(COMPUTE),
        closeness.to(COMPUTE),
    )


@triton.jit
def _moments_block(
    v, g, m, w, p, buffer, first, length, scalars, FORM: tl.constexpr, FIRSTS: tl.constexpr, DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr, STORAGE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of v; returns sums of the squares of its values, float64."""
    COMPUTE: tl.constexpr = compute_type(STORAGE[0])
    COUNT: tl.constexpr = 1 if FORM == LINEAR else 3 + FIRSTS + DECAY
    rate, slope = scalars[0], scalars[3]
    d = load(v, first, length, STORAGE[0], COMPUTE, BLOCK, MASKED)
    if FORM == LINEAR:
        adapted = (rate * slope) * d
    else:
        gradient = load(g, first, length, STORAGE[1], COMPUTE, BLOCK, MASKED)
        second = load(w, first, length, STORAGE[2 + FIRSTS], COMPUTE, BLOCK, MASKED)
        mean, theta, moved = gradient, gradient, gradient  # not read unless
        if FIRSTS:
            mean = load(m, first, length, STORAGE[2], COMPUTE, BLOCK, MASKED)
        if DECAY != NO_DECAY:
            theta = load(p, first, length, STORAGE[3 + FIRSTS], COMPUTE, BLOCK, MASKED)
        if DECAY == BUFFER:
            moved = load(buffer, first, length, STORAGE[4 + FIRSTS], COMPUTE, BLOCK, MASKED)
        if MAXIMIZE:
            gradient = gradient * -1.0  # not -gradient, which is 0 - gradient in Triton: it loses the sign of zeros
        if FORM == MAXIMUM:
            derivative = _maximum(gradient, mean, second, theta, scalars, DECAY)
        elif FORM == DELTA:
            derivative = _delta(gradient, mean, second, theta, scalars, DECAY)
        else:
            derivative = _ratio(gradient, mean, second, theta, moved, scalars, FORM, FIRSTS, DECAY)
        adapted = (rate * derivative) * d
    if MAXIMIZE:
        adapted = adapted * -1.0
    store_words(v, first, length, narrow(adapted, STORAGE[0]), BLOCK, MASKED)
    wide = in_chunk(adapted.to(tl.float64), first, length, BLOCK, MASKED)
    return partial_sums(wide * wide, one_access(STORAGE, COUNT))


@triton.jit
def _ratio(gradient, m, w, theta, buffer, scalars, FORM: tl.constexpr, FIRSTS: tl.constexpr, DECAY: tl.constexpr):
    rate, a, b, slope, kappa, omega, eps, slope_tail, noise, weight_decay, _, _, inv_sqrt_omega, _ = scalars
    second = w
    if FORM == CENTERED:
        second = w - m * m
        second = 0.5 * (second + tl.abs(second))  # 0 where it is negative by rounding; NaN stays
    s = sqrt(second)
    q = kappa * s + eps
    # One division serves 1/q and 1/(s q): it is the longest of all operations here.
    one = tl.full(w.shape, 1.0, w.dtype)
    empty = second == 0.0
    divisor = tl.where(empty, one, s)
    inv_sq = tl.where(q == 0.0, 0.0, divide(one, divisor * q))
    inv_q = inv_sq * divisor
    g = gradient
    if DECAY == BUFFER:
        g = gradient + weight_decay * (theta + rate * buffer)
    if DECAY == IMPLICIT:
        if FORM == CENTERED:
            g = _effective(gradient, m, theta, q, sqrt(w) * inv_sqrt_omega, scalars, False)
        else:
            g = _effective(gradient, m, theta, q, s * inv_sqrt_omega, scalars, FIRSTS)
    numerator = a * g
    lean = g  # dw/dg = 2 omega lean
    if FORM == CENTERED:
        lean = g - m
    elif FIRSTS:
        numerator = numerator + b * m
    r = slope * second - omega * (numerator * lean)
    r = tl.where((tl.abs(r) <= noise * w) | empty, 0.0, r)
    return (kappa * (r * inv_sq)) * inv_q + (slope_tail * inv_q) * inv_q


@triton.jit
def _maximum(gradient, m, n, theta, scalars, DECAY: tl.constexpr):
    _, a, b, slope, _, _, eps, slope_tail, noise, weight_decay, _, _, _, closeness = scalars
    g = gradient
    scale = n
    if DECAY == IMPLICIT:
        g = _effective(gradient, m, theta, n, n, scalars, True)
        scale = n + weight_decay * tl.abs(theta)
    size = tl.abs(g)
    elsewhere = tl.abs(n - (size + eps)) > closeness * scale  # NaN: not, so that it stays
    numerator = a * g + b * m
    r = slope * size - tl.where(g > 0.0, numerator, tl.where(g < 0.0, numerator * -1.0, 0.0))
    r = tl.where(tl.abs(r) <= noise * n, 0.0, r)
    one = tl.full(n.shape, 1.0, n.dtype)
    inv_n = tl.where(n == 0.0, 0.0, divide(one, n))
    return (tl.where(elsewhere, slope * n, r + slope_tail) * inv_n) * inv_n


@triton.jit
def _delta(gradient, m, w, theta, scalars, DECAY: tl.constexpr):
    _, _, _, _, kappa, omega, eps, slope_tail, noise, weight_decay, decay_g, _, _, _ = scalars
    one = tl.full(w.shape, 1.0, w.dtype)
    spread = w + eps
    inv = tl.where(spread == 0.0, 0.0, divide(one, spread))
    known = gradient  # and weight_decay theta after the step: 0 where u is
    if DECAY == IMPLICIT:
        known = known + weight_decay * theta
    # The cells that "paper" leaves out are made 0 here and not at the end, until where it takes more registers: 110
    # instead of 92 in float32, and with weight decay more than 128.
    kept = tl.where((gradient == 0.0) & (known == 0.0), slope_tail, one)
    size = ((m + kappa * eps) * inv) * kept
    if DECAY == IMPLICIT:
        y = _halley(known * sqrt(omega * inv), decay_g * sqrt(size), sqrt(w * inv), kappa)
        share = y * y
        square = share * spread  # omega g^2
    else:
        square = omega * (known * known)
        share = square * inv
    rest = kappa + share
    rms = sqrt(size * tl.where(rest == 0.0, 0.0, divide(one, rest)))  # delta / g
    r = w - square
    r = tl.where(tl.abs(r) <= noise * w, 0.0, r)
    return rms * ((r + eps) * inv)


@triton.jit
def _halley(known, pull, bound, kappa):
    """y = known + pull y / sqrt(kappa + y^2), |y| <= bound, by Halley's method."""
    lift = pull * kappa
    y = _held(known, bound)
    for _ in tl.static_range(HALLEY_STEPS):
        square = kappa + y * y
        s = sqrt(square)
        value = s * (y - known) - pull * y
        slope = s * square - lift
        rest = slope * slope - (lift * (y * value)) * 1.5
        y = _held(y - tl.where(rest == 0.0, 0.0, divide((value * slope) * square, rest)), bound)
    return y


@triton.jit
def _effective(gradient, m, theta, q, bound, scalars, MEAN: tl.constexpr):
    """What the moments saw: under weight decay it contains theta before the step."""
    _, _, _, _, _, _, _, _, _, weight_decay, decay_g, decay_m, _, _ = scalars
    known = gradient * q + weight_decay * (theta * q)
    if MEAN:
        known = known + decay_m * m
    rest = q - decay_g
    return _held(tl.where(rest == 0.0, 0.0, divide(known, rest)), bound)


@triton.jit
def _held(x, bound):
    x = tl.where(x > bound, bound, x)  # NaN stays
    return tl.where(x < bound * -1.0, bound * -1.0, x)
