"""The ops in plain PyTorch: readable, on any device, and what every other backend is compared with.

Tensors may have any strides; arithmetic is in float64 for float64 storage and in float32 otherwise. Arguments are
checked before anything is written, and `perturb` is all-or-nothing: if a tensor in the middle of the list raises (out
of memory), those before it are put back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sama_kernels.backends import low_bit, moments
from sama_kernels.backends.arguments import (
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
    check_adapt_norm_adam,
    check_adapt_norm_moments,
    check_adapt_norm_scale,
    check_central_difference,
    check_perturb,
    check_restore,
    check_step_size,
)
from sama_kernels.backends.rounding import random_like, round_stochastically

__all__ = [
    "CENTERED",
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
    "bits",
    "central_difference",
    "compute_dtype",
    "perturb",
    "restore",
    "step_size",
]

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values stored as `dtype` are added and multiplied."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bits(tensor: Tensor) -> Tensor:
    """`tensor` seen as integers of the same width (shares memory)."""
    return tensor.detach().view(_BITS[tensor.element_size()])


def adapt_norm_adam(
    v: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    params: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr_tensor: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    mode: int,
) -> Tensor:
    """See `sama_kernels.ops.adapt_norm_adam`."""
    check_adapt_norm_adam(
        v, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, params, steps, lr_tensor, weight_decay, mode
    )
    total = _zero(v)
    for i, d in enumerate(v):
        dtype = compute_dtype(d.dtype)
        device = d.device
        g, m, w = (x[i].detach().to(dtype) for x in (grads, exp_avgs, exp_avg_sqs))
        t = steps[i].to(device=device, dtype=torch.float64)
        rate = lr if lr_tensor is None else lr_tensor.to(device=device, dtype=torch.float64)
        c1, c2 = 1 - beta1**t, 1 - beta2**t
        step_size, paper_rate = (rate / c1).to(dtype), (rate / (c1 * c2)).to(dtype)
        tail_rate = (rate / c1 * (1 - beta1) * eps).to(dtype)
        second = (max_exp_avg_sqs[i].detach().to(dtype)) if max_exp_avg_sqs else w
        s = second.sqrt() * (1 / c2.sqrt()).to(dtype)
        q = s + eps
        empty = second == 0
        divisor = torch.where(empty, 1.0, s)
        inv_sq = torch.where(q == 0, 0.0, 1 / (divisor * q))
        inv_q = inv_sq * divisor
        if maximize:
            g = -g
        if weight_decay != 0.0:  # L2 decay acts on theta before the step: theta + the update that was subtracted
            g = g + weight_decay * (params[i].detach().to(dtype) + step_size * (m * inv_q))
        part = (1 - beta2) * (m * g)
        if max_exp_avg_sqs:  # amsgrad: the second moment takes part in the derivative only where it is the maximum
            part = torch.where(w == second, part, 0.0)
        numerator = (1 - beta1) * second - part  # r w
        # Below the rounding of the stored moments r is noise: at the first step it is exactly 0 in real numbers.
        noise = 8 * torch.finfo(exp_avgs[i].dtype).eps * (1 - beta1)
        numerator = torch.where((numerator.abs() <= noise * second) | empty, 0.0, numerator)
        adapted = (paper_rate * (numerator * inv_sq)) * inv_q
        if mode == EXACT:
            adapted = adapted + (tail_rate * inv_q) * inv_q
        adapted = adapted * d.to(dtype)
        if maximize:
            adapted = -adapted
        total += torch.linalg.vector_norm(adapted, dtype=torch.float64).square()
        d.copy_(adapted)
    return total


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
    total = _zero(v)
    for i, (d, t) in enumerate(zip(v, steps, strict=True)):
        g = grads[i].detach().to(compute_dtype(d.dtype))
        m, w = low_bit.known_moments(exp_avgs, exp_avg_sqs, i, g, t, block_size, beta1, beta2)
        total += adapt_norm_adam([d], [g], [m], [w], [], [], [t], lr_tensor, lr, beta1, beta2, eps, 0.0, False, mode)
    return total


def adapt_norm_scale(v: Sequence[Tensor], scale_tensor: Tensor | None, scale: float) -> Tensor:
    """See `sama_kernels.ops.adapt_norm_scale`."""
    check_adapt_norm_scale(v, scale_tensor)
    total = _zero(v)
    for d in v:
        dtype = compute_dtype(d.dtype)
        factor = scale if scale_tensor is None else scale * scale_tensor.to(device=d.device, dtype=torch.float64)
        adapted = d.to(dtype) * torch.as_tensor(factor, dtype=torch.float64, device=d.device).to(dtype)
        total += torch.linalg.vector_norm(adapted, dtype=torch.float64).square()
        if scale_tensor is not None or scale != 1.0:
            d.copy_(adapted)
    return total


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
    lists = check_adapt_norm_moments(v, grads, firsts, seconds, params, buffers, coefficients, weight_decay, form)
    total = _zero(v)
    for i, d in enumerate(v):
        dtype = compute_dtype(d.dtype)
        ulps = [torch.finfo(lists[name][i].dtype).eps for name in ("firsts", "seconds") if name in lists]
        scalars = moments.Scalars.of(coefficients[i], weight_decay, maximize, max([0.0, *ulps]), dtype)
        adapted = moments.adapted({name: x[i].detach().to(dtype) for name, x in lists.items()}, scalars, form)
        total += torch.linalg.vector_norm(adapted, dtype=torch.float64).square()
        d.copy_(adapted)
    return total


def step_size(norm_sqs: Sequence[Tensor], alpha: float, tiny: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `sama_kernels.ops.step_size`."""
    check_step_size(norm_sqs)
    norm = torch.stack(list(norm_sqs)).sum().sqrt()
    degenerate = ~(norm.isfinite() & (norm > tiny))
    epsilon = torch.where(degenerate, 0.0, alpha / norm)
    return norm, epsilon, degenerate


def perturb(
    params: Sequence[Tensor], v: Sequence[Tensor], epsilon: Tensor, side: int, rounding: int, seed: int, measure: bool
) -> Tensor:
    """See `sama_kernels.ops.perturb`."""
    check_perturb(params, v, epsilon, side, rounding)
    sums = torch.full((2,), torch.nan, dtype=torch.float64, device=epsilon.device)
    if side == MINUS:  # never leaves a tensor that `restore` could not put back, wherever it stops
        for p, x in zip(params, v, strict=True):
            _move_to_minus(p.detach(), bits(x))
        return sums
    if measure:
        sums.zero_()
    done = 0
    try:
        for i, (p, x) in enumerate(zip(params, v, strict=True)):
            random = random_like(p, x, seed, i) if rounding == STOCHASTIC and p.element_size() == 2 else None
            _move_to_plus(p.detach(), x, epsilon, random, sums if measure else None)
            done += 1
    except BaseException:
        restore(params[:done], v[:done])
        raise
    return sums


def restore(params: Sequence[Tensor], v: Sequence[Tensor]) -> None:
    """See `sama_kernels.ops.restore`."""
    check_restore(params, v)
    for p, x in zip(params, v, strict=True):
        bits(p).bitwise_xor_(bits(x))


def central_difference(
    grads_plus: Sequence[Tensor],
    grads_minus: Sequence[Tensor],
    explicit: Sequence[Tensor],
    epsilon: Tensor,
    norm: Tensor,
) -> None:
    """See `sama_kernels.ops.central_difference`."""
    check_central_difference(grads_plus, grads_minus, explicit, epsilon, norm)
    for i, (plus, minus) in enumerate(zip(grads_plus, grads_minus, strict=True)):
        dtype = compute_dtype(plus.dtype)
        factor = (-0.5 / epsilon).to(dtype)
        implicit = torch.where(epsilon == 0, 0.0, (plus.to(dtype) - minus.to(dtype)) * factor)
        if explicit:
            implicit = implicit + torch.where(norm.isfinite(), explicit[i].to(dtype), 0.0)
        plus.copy_(implicit)


def _zero(v: Sequence[Tensor]) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=v[0].device)


def _move_to_plus(p: Tensor, v: Tensor, epsilon: Tensor, random: Tensor | None, sums: Tensor | None) -> None:
    dtype = compute_dtype(p.dtype)
    step = epsilon.to(dtype) * v.to(dtype)
    moved = p.to(dtype) + step
    moved = moved.to(p.dtype) if random is None else round_stochastically(moved, p.dtype, random)
    moved = torch.where(epsilon == 0, p, moved)
    if sums is not None:
        realised = moved.double() - p.double()
        products = torch.stack([(realised * step.double()).sum(), realised.square().sum()])
        sums += torch.where(epsilon == 0, 0.0, products)
    difference = bits(p) ^ bits(moved)
    bits(v).copy_(difference)  # from here on nothing is allocated, so nothing can fail
    p.copy_(moved)


def _move_to_minus(p: Tensor, difference: Tensor) -> None:
    dtype = compute_dtype(p.dtype)
    centre = (bits(p) ^ difference).view(p.dtype)
    step = p.to(dtype) - centre.to(dtype)
    moved = torch.where(difference == 0, centre, (centre.to(dtype) - step).to(p.dtype))
    new_difference = bits(centre) ^ bits(moved)
    difference.copy_(new_difference)
    p.copy_(moved)
