"""`adapt_norm_moments` for one tensor in plain PyTorch. The derivations: sama_kernels/ops/adapt_norm_moments.py; the
operations and their order are those of csrc/common/moments.h."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sama_kernels.backends.arguments import CENTERED, DELTA, LINEAR, MAXIMUM

_HALLEY_STEPS = 5


@dataclass(frozen=True)
class Scalars:
    """The numbers of one tensor, 0-dim in the compute dtype, computed in float64."""

    rate: Tensor
    a: Tensor
    b: Tensor
    slope: Tensor
    kappa: Tensor
    omega: Tensor
    eps: Tensor
    slope_tail: Tensor
    noise: Tensor
    weight_decay: Tensor
    decay_g: Tensor
    decay_m: Tensor
    inv_sqrt_omega: Tensor
    closeness: Tensor
    sign: Tensor

    @classmethod
    def of(cls, row: Tensor, weight_decay: float, maximize: bool, state_ulp: float, dtype: torch.dtype) -> Scalars:
        """`row`: the tensor's coefficients; `state_ulp`: the spacing of the numbers next to 1 in its state's dtype."""
        ulp = max(state_ulp, torch.finfo(dtype).eps)
        rate, a, b, slope, kappa, omega, eps, tail = row.unbind()

        def number(value: float) -> Tensor:
            return torch.full_like(rate, value)

        decay, closeness = number(weight_decay), number((2 if weight_decay != 0.0 else 1) * ulp)
        numbers = (
            rate, a, b, slope, kappa, omega, eps, slope * tail, 8 * ulp * slope.abs(), decay, decay * rate * a,
            decay * rate * b, 1 / omega.sqrt(), closeness, number(-1.0 if maximize else 1.0),
        )  # fmt: skip
        return cls(*(x.to(dtype) for x in numbers))


def adapted(x: dict[str, Tensor], k: Scalars, form: int) -> Tensor:
    """D d, where `x` has the operands by the names of the op's lists, in the compute dtype."""
    if form == LINEAR:
        return (k.rate * k.slope) * x["v"] * k.sign
    if form == DELTA:
        derivative = _delta(x, k)
    else:
        derivative = _maximum(x, k) if form == MAXIMUM else _ratio(x, k, form == CENTERED)
    return (k.rate * derivative) * x["v"] * k.sign


def _ratio(x: dict[str, Tensor], k: Scalars, centered: bool) -> Tensor:
    m, w = x.get("firsts"), x["seconds"]
    second = w
    if centered:
        assert m is not None  # the op's check
        second = w - m * m
        second = 0.5 * (second + second.abs())  # 0 where it is negative by rounding; NaN stays
    s = second.sqrt()
    q = k.kappa * s + k.eps
    empty = second == 0
    divisor = torch.where(empty, 1.0, s)
    inv_sq = torch.where(q == 0, 0.0, 1 / (divisor * q))
    inv_q = inv_sq * divisor
    g = _effective_gradient(x, k, q, (w.sqrt() if centered else s) * k.inv_sqrt_omega, mean=not centered)
    numerator = k.a * g
    if m is not None and not centered:
        numerator = numerator + k.b * m
    lean = g - m if centered and m is not None else g  # dw/dg = 2 omega lean
    r = k.slope * second - k.omega * (numerator * lean)
    r = torch.where((r.abs() <= k.noise * w) | empty, 0.0, r)
    return (k.kappa * (r * inv_sq)) * inv_q + (k.slope_tail * inv_q) * inv_q


def _maximum(x: dict[str, Tensor], k: Scalars) -> Tensor:
    m, n = x["firsts"], x["seconds"]
    inv_n = torch.where(n == 0, 0.0, 1 / n)
    g = _effective_gradient(x, k, n, n, mean=True)
    size = g.abs()
    scale = n + k.weight_decay * x["params"].abs() if "params" in x else n
    elsewhere = (n - (size + k.eps)).abs() > k.closeness * scale  # NaN: not, so that it stays
    numerator = k.a * g + k.b * m
    signed = torch.where(g > 0, numerator, torch.where(g < 0, -numerator, 0.0))
    r = k.slope * size - signed
    r = torch.where(r.abs() <= k.noise * n, 0.0, r)
    return (torch.where(elsewhere, k.slope * n, r + k.slope_tail) * inv_n) * inv_n


def _delta(x: dict[str, Tensor], k: Scalars) -> Tensor:
    m, w = x["firsts"], x["seconds"]
    spread = w + k.eps
    inv = torch.where(spread == 0, 0.0, 1 / spread)
    known = k.sign * x["grads"]  # and weight_decay theta after the step: 0 where u is
    if "params" in x:
        known = known + k.weight_decay * x["params"]
    kept = torch.where((x["grads"] == 0) & (known == 0), k.slope_tail, 1.0)
    size = ((m + k.kappa * k.eps) * inv) * kept
    if "params" in x:
        y = _halley(k, known * (k.omega * inv).sqrt(), k.decay_g * size.sqrt(), (w * inv).sqrt())
        share = y * y
        square = share * spread  # omega g^2
    else:
        square = k.omega * (known * known)
        share = square * inv
    rest = k.kappa + share
    rms = (size * torch.where(rest == 0, 0.0, 1 / rest)).sqrt()  # delta / g
    r = w - square
    r = torch.where(r.abs() <= k.noise * w, 0.0, r)
    return rms * ((r + k.eps) * inv)


def _halley(k: Scalars, known: Tensor, pull: Tensor, bound: Tensor) -> Tensor:
    """y = known + pull y / sqrt(kappa + y^2), |y| <= bound, by Halley's method."""
    lift = pull * k.kappa
    y = _held(known, bound)
    for _ in range(_HALLEY_STEPS):
        square = k.kappa + y * y
        s = square.sqrt()
        value = s * (y - known) - pull * y
        slope = s * square - lift
        rest = slope * slope - 1.5 * (lift * (y * value))
        move = torch.where(rest == 0, 0.0, ((value * slope) * square) / rest)
        y = _held(y - move, bound)
    return y


def _effective_gradient(x: dict[str, Tensor], k: Scalars, q: Tensor, bound: Tensor, mean: bool) -> Tensor:
    """What the moments saw: under weight decay it contains theta before the step, which is theta + u(g)."""
    g = k.sign * x["grads"]
    if "params" not in x:
        return g
    if "buffers" in x:
        return g + k.weight_decay * (x["params"] + k.rate * x["buffers"])
    known = g * q + k.weight_decay * (x["params"] * q)
    if mean and "firsts" in x:
        known = known + k.decay_m * x["firsts"]
    rest = q - k.decay_g
    return _held(torch.where(rest == 0, 0.0, known / rest), bound)


def _held(x: Tensor, bound: Tensor) -> Tensor:
    x = torch.where(x > bound, bound, x)  # NaN stays
    return torch.where(x < -bound, -bound, x)
