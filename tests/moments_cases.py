"""Random inputs of `adapt_norm_moments`, and its results in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from op_cases import F64, clones, randn, undecided
from torch import Tensor

from sama_kernels import ops
from sama_kernels.backends.reference import compute_dtype

LISTS = ("v", "grads", "firsts", "seconds", "params", "buffers")


@dataclass(frozen=True)
class Variant:
    """What distinguishes the loops of the kernels."""

    form: int
    firsts: bool = False
    decay: float = 0.0
    buffers: bool = False

    def __str__(self) -> str:
        name = ("linear", "ratio", "centered", "maximum", "delta")[self.form]
        return " ".join([name, *(part for part in ("firsts", "decay", "buffers") if getattr(self, part))])


VARIANTS = [
    Variant(ops.LINEAR),
    Variant(ops.RATIO),
    Variant(ops.RATIO, decay=0.1),
    Variant(ops.RATIO, decay=0.1, buffers=True),
    Variant(ops.RATIO, firsts=True),
    Variant(ops.RATIO, firsts=True, decay=0.1),
    Variant(ops.CENTERED, firsts=True),
    Variant(ops.CENTERED, firsts=True, decay=0.1),
    Variant(ops.CENTERED, firsts=True, decay=0.1, buffers=True),
    Variant(ops.MAXIMUM, firsts=True),
    Variant(ops.MAXIMUM, firsts=True, decay=0.1),
    Variant(ops.DELTA, firsts=True),
    Variant(ops.DELTA, firsts=True, decay=0.1),
]


@dataclass
class Row:
    """Coefficients of one tensor; different for each, so that rows cannot be mixed up unseen."""

    rate: float
    a: float
    b: float
    slope: float
    kappa: float
    omega: float
    eps: float
    tail: float

    @property
    def values(self) -> list[float]:
        return [self.rate, self.a, self.b, self.slope, self.kappa, self.omega, self.eps, self.tail]


class Moments:
    """Inputs that four steps of an optimizer of this form produce: those of the last one, and what it left."""

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, state: torch.dtype, variant: Variant,
        maximize: bool = False, exact: bool = True,
    ) -> None:  # fmt: skip
        self.variant = variant
        self.maximize, self.sign = maximize, -1.0 if maximize else 1.0
        self.rows = [self._row(0.7 + 0.05 * (i % 7), exact) for i in range(len(shapes))]
        self.coefficients = torch.tensor([row.values for row in self.rows], dtype=F64)
        lists: dict[str, list[Tensor]] = {name: [] for name in LISTS}
        for shape, row in zip(shapes, self.rows, strict=True):
            for name, x in self._steps(shape, row).items():
                lists[name].append(x.to(state if name in ("firsts", "seconds", "buffers") else dtype))
        self.v = randn(shapes, dtype)
        # Nearly all of w - m^2 can cancel; in float64 the exact values then have rounding errors like the others'.
        self.factor = 4.0 if variant.form == ops.CENTERED and dtype == F64 else 2.0
        self.grads, self.firsts, self.seconds, self.params, self.buffers = (lists[name] for name in LISTS[1:])
        if variant.form == ops.LINEAR:
            self.grads, self.seconds = [], []
        self.firsts = self.firsts if variant.firsts else []
        self.params = self.params if variant.decay else []
        self.buffers = self.buffers if variant.buffers else []

    def _row(self, c: float, exact: bool) -> Row:
        eps = 1e-3 * c
        tail = eps if exact else 0.0
        if self.variant.form == ops.DELTA:  # decay takes up to half of theta in a step
            return Row(5 * c, 1.0, 0.0, 1.0, c - 0.1, 1.1 - c, 1e-5 * c, float(exact))
        if self.variant.form == ops.MAXIMUM:
            return Row(3e-3 * c, 0.0, 1.0, 0.1, 0.0, 0.0, eps, tail)
        if self.variant.form == ops.RATIO and self.variant.firsts:
            return Row(3e-3 * c, 0.4, c, 0.4 + 0.1 * c, 1.5 * c, 0.05, eps, tail)
        return Row(3e-3 * c, 1.0, 0.0, 1.0, 1.5 * c, 0.3 * c, eps, tail)

    def _steps(self, shape: tuple[int, ...], row: Row) -> dict[str, Tensor]:
        theta = torch.randn(shape, dtype=F64)
        m, w, buffer = torch.zeros_like(theta), torch.zeros_like(theta), torch.zeros_like(theta)
        for _ in range(4):
            g = 0.01 * torch.randn(shape, dtype=F64)
            m, w, step = self._step(row, g, m, w)
            buffer = 0.5 * buffer + step
            before = theta
            theta = theta - row.rate * (buffer if self.variant.buffers else step)
        grads = self.sign * (g - self.variant.decay * before)
        return {"grads": grads, "firsts": m, "seconds": w, "params": theta, "buffers": buffer}

    def _step(self, row: Row, g: Tensor, m: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The state that a step leaves, and the step itself, without its rate."""
        form = self.variant.form
        if form == ops.DELTA:
            w = row.kappa * w + row.omega * g * g
            step = g * ((m + row.eps) / (w + row.eps)).sqrt()
            return row.kappa * m + row.omega * step * step, w, step
        m = m + (row.omega if form == ops.CENTERED else 0.1) * (g - m)
        if form == ops.MAXIMUM:
            w = torch.maximum(0.9 * w, g.abs() + row.eps)
        else:
            w = (1 - row.omega) * w + row.omega * g * g
        return m, w, self._numerator(row, g, m) / self._divisor(row, m, w)

    def _numerator(self, row: Row, g: Tensor, m: Tensor) -> Tensor:
        return row.a * g if self.variant.form == ops.CENTERED else row.a * g + row.b * m

    def _divisor(self, row: Row, m: Tensor, w: Tensor) -> Tensor:
        if self.variant.form == ops.MAXIMUM:
            return w
        return row.kappa * (w - m * m if self.variant.form == ops.CENTERED else w).clamp(min=0).sqrt() + row.eps

    @property
    def lists(self) -> list[list[Tensor]]:
        return [getattr(self, name) for name in LISTS]

    @property
    def scalars(self) -> dict[str, Any]:
        return {"weight_decay": self.variant.decay, "maximize": self.maximize, "form": self.variant.form}

    def run(self, backend: str) -> tuple[list[Tensor], Tensor]:
        v = clones(self.v)
        norm_sq = ops.adapt_norm_moments(v, *self.lists[1:], self.coefficients, **self.scalars, backend=backend)
        return v, norm_sq

    def exact(self, i: int) -> Tensor:
        """D d in float64, by the quotient rule; see `undecided`."""
        row, form = self.rows[i], self.variant.form
        d = self.v[i]
        if form == ops.LINEAR:
            return self.sign * row.rate * row.slope * d.double()
        w = self.seconds[i].double()
        m = self.firsts[i].double() if self.firsts else torch.zeros_like(w)
        ulp = max(
            torch.finfo(x).eps
            for x in (*(x[i].dtype for x in (self.firsts, self.seconds) if x), compute_dtype(d.dtype))
        )
        if form == ops.DELTA:
            g = self._gradient_before_delta(i, row, m, w)
            before = (m + row.kappa * row.eps) * (w + row.eps) / (row.kappa * (w + row.eps) + row.omega * g * g)
            r, noise = w - row.omega * g * g, 8 * ulp * w
            top = torch.where(r.abs() <= noise, 0.0, r) + row.eps
            derivative = (
                torch.where((self.grads[i] == 0) & (g == 0), row.tail, 1.0) * before.sqrt() * top / (w + row.eps) ** 1.5
            )
            return undecided(self.sign * row.rate * derivative * d, r.abs(), noise)
        q = self._divisor(row, m, w)
        g = self._gradient(i, row, m, q)
        n = self._numerator(row, g, m)
        if form == ops.MAXIMUM:
            size = w + 0.1 * self.params[i].double().abs() if self.variant.decay else w
            distance, limit = (w - g.abs() - row.eps).abs(), (2 if self.variant.decay else 1) * ulp * size
            made = distance <= limit
            r = row.slope * g.abs() - n * g.sign()
            r = torch.where(r.abs() <= 8 * ulp * row.slope * w, 0.0, r)
            derivative = torch.where(made, (r + row.slope * row.tail) / w**2, row.slope / w)
            return undecided(self.sign * row.rate * derivative * d, distance, limit)
        lean = g - m if form == ops.CENTERED else g
        second = (w - m * m).clamp(min=0) if form == ops.CENTERED else w
        s = second.sqrt()
        ds = torch.where(second == 0, 0.0, row.omega * lean / s)
        r, noise = (row.slope * second - row.omega * n * lean).abs(), 8 * ulp * row.slope * w
        zero = (r <= noise) | (second == 0)
        derivative = torch.where(zero, 0.0, row.kappa * (row.slope * s - n * ds)) / q**2
        return undecided(self.sign * row.rate * (derivative + row.slope * row.tail / q**2) * d, r, noise)

    def _gradient(self, i: int, row: Row, m: Tensor, q: Tensor) -> Tensor:
        g = self.sign * self.grads[i].double()
        decay = self.variant.decay
        if not decay:
            return g
        theta = self.params[i].double()
        if self.buffers:
            return g + decay * (theta + row.rate * self.buffers[i].double())
        mean = 0.0 if self.variant.form == ops.CENTERED else row.rate * row.b * m / q
        return (g + decay * (theta + mean)) / (1 - decay * row.rate * row.a / q)

    def _gradient_before_delta(self, i: int, row: Row, m: Tensor, w: Tensor) -> Tensor:
        """By bisection, between the gradients that the state allows."""
        g = self.sign * self.grads[i].double()
        if not self.variant.decay:
            return g
        known, bound = g + self.variant.decay * self.params[i].double(), (w / row.omega).sqrt()
        low, high = -bound, bound
        for _ in range(80):
            x = (low + high) / 2
            delta = x * ((m + row.kappa * row.eps) / (row.kappa * (w + row.eps) + row.omega * x * x)).sqrt()
            above = x - self.variant.decay * row.rate * delta > known
            low, high = torch.where(above, low, x), torch.where(above, x, high)
        return high
