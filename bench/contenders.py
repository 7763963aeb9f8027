"""Who competes: the ops of this library on each backend, torch.compile of the reference, and `torch._foreach_*`.

Every contender has working lists `params` and `v` of its own kind, and one method per op that works on them in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.inputs import EPSILON, PER_SCALE, STEP, Inputs
from sama_kernels import ops

LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8
ALPHA, TINY = 1.0, 1e-30
# rate, a, b, slope, kappa, omega, eps, tail of ops.adapt_norm_moments, adaptation "paper": RMSprop, NAdam at step 100.
# Adadelta: "exact", as a few of 1e8 random gradients are 0.
RMSPROP = (LR, 1.0, 0.0, 1.0, 1.0, 1e-2, EPS, 0.0)
NADAM = (LR, 0.5, 0.55, 0.555, (1 - BETA2**STEP) ** -0.5, 1 - BETA2, EPS, 0.0)
ADADELTA = (1.0, 1.0, 0.0, 1.0, 0.99, 1e-2, 1e-6, 1.0)
SCALE = -1.0  # its own inverse: v can be scaled again and again


class Library:
    """The ops of this library on one backend; with `compiled`, torch.compile of each (of the reference's)."""

    scalar_tolerance = 1e-5

    def __init__(self, inputs: Inputs, backend: str, lists: tuple[list[Tensor], list[Tensor]], compiled: bool = False):
        self.inputs = inputs
        self.params, self.v = lists
        self.rmsprop, self.nadam, self.adadelta = (
            torch.tensor([row] * len(self.v), dtype=torch.float64, device=inputs.device)
            for row in (RMSPROP, NADAM, ADADELTA)
        )

        def on_backend(op: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                return op(*arguments, **options, backend=backend)

            return torch.compile(call, fullgraph=True, dynamic=False) if compiled else call

        self._adam, self._scale = on_backend(ops.adapt_norm_adam), on_backend(ops.adapt_norm_scale)
        self._moments, self._low_bit = on_backend(ops.adapt_norm_moments), on_backend(ops.adapt_norm_low_bit_adam)
        self._step_size, self._perturb = on_backend(ops.step_size), on_backend(ops.perturb)
        self._restore, self._difference = on_backend(ops.restore), on_backend(ops.central_difference)

    def fresh(self) -> None:
        """theta and d as they are at the beginning of a meta step."""
        torch._foreach_copy_(self.params, self.inputs.theta)
        self.fresh_v()

    def fresh_v(self) -> None:
        torch._foreach_copy_(self.v, self.inputs.d)

    def adapt_norm_adam(self) -> Tensor:
        x = self.inputs
        norm_sq: Tensor = self._adam(
            self.v, x.grads, x.m, x.w, [], [], x.steps, lr=LR, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=0.0,
            maximize=False, mode=ops.PAPER,
        )  # fmt: skip
        return norm_sq

    def adapt_norm_adam8bit(self) -> Tensor:
        x = self.inputs
        norm_sq: Tensor = self._low_bit(
            self.v, x.grads, *x.stored, x.steps, block_size=PER_SCALE, lr=LR, beta1=BETA1, beta2=BETA2, eps=EPS,
            mode=ops.PAPER,
        )  # fmt: skip
        return norm_sq

    def adapt_norm_rmsprop(self) -> Tensor:
        return self._form(ops.RATIO, self.rmsprop, [])

    def adapt_norm_nadam(self) -> Tensor:
        return self._form(ops.RATIO, self.nadam, self.inputs.m)

    def adapt_norm_adadelta(self) -> Tensor:
        return self._form(ops.DELTA, self.adadelta, self.inputs.deltas)

    def _form(self, form: int, coefficients: Tensor, firsts: list[Tensor]) -> Tensor:
        x = self.inputs
        norm_sq: Tensor = self._moments(
            self.v, x.grads, firsts, x.w, [], [], coefficients, weight_decay=0.0, maximize=False, form=form
        )
        return norm_sq

    def adapt_norm_scale(self) -> Tensor:
        norm_sq: Tensor = self._scale(self.v, SCALE)
        return norm_sq

    def step_size(self) -> Tensor:
        epsilon: Tensor = self._step_size([self.inputs.norm_sq], ALPHA, TINY)[1]
        return epsilon

    def plus(self, epsilon: Tensor | None = None, **options: Any) -> Tensor:
        sums: Tensor = self._perturb(
            self.params, self.v, self.inputs.epsilon if epsilon is None else epsilon, ops.PLUS, **options
        )
        return sums

    def minus(self) -> None:
        self._perturb(self.params, self.v, self.inputs.epsilon, ops.MINUS)

    def restore(self) -> None:
        self._restore(self.params, self.v)

    def central_difference(self) -> None:
        x = self.inputs
        self._difference(self.v, x.grads, [], x.epsilon, x.norm_sq)

    def element_wise_part(self) -> Tensor:
        """What a meta step does between its passes, without the passes: v, epsilon, theta+, theta-, theta."""
        epsilon: Tensor = self._step_size([self.adapt_norm_adam()], ALPHA, TINY)[1]
        self.plus(epsilon)
        self.minus()
        self.restore()
        return epsilon


class Foreach:
    """The same results by `torch._foreach_*`, as a careful user would write it: in place, with few passes over memory.

    It does less than the ops: rounding noise in D is kept; epsilon must be known on the host (waited for only in
    `element_wise_part`); norms that are zero or not finite are not dealt with; and theta comes back exactly because a
    copy of it is kept, an extra buffer of the model's size.
    """

    scalar_tolerance = 0.05  # torch's float32 norm of 1e8 elements on a CPU is 1.1 % too small

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.params, self.v, self.saved = ([torch.empty_like(x) for x in inputs.theta] for _ in range(3))
        self.side = 1.0

    def fresh(self) -> None:
        torch._foreach_copy_(self.params, self.inputs.theta)
        self.fresh_v()

    def fresh_v(self) -> None:
        torch._foreach_copy_(self.v, self.inputs.d)

    def adapt_norm_adam(self) -> Tensor:
        x = self.inputs
        foreach_adam(self.v, x.grads, x.m, x.w, lr=LR, betas=(BETA1, BETA2), eps=EPS, step=STEP)
        return self.norm_sq()

    def adapt_norm_adam8bit(self) -> Tensor:
        """One tensor at a time, so that there is memory for its moments only."""
        *stored, grads = (*self.inputs.stored, self.inputs.grads)
        for v, grad, *parts in zip(self.v, grads, *stored, strict=True):
            m, w = (dequantised(*moment).view(v.shape) for moment in (parts[:3], parts[3:]))
            foreach_adam([v], [grad], [m], [w], lr=LR, betas=(BETA1, BETA2), eps=EPS, step=STEP)
        return self.norm_sq()

    def adapt_norm_rmsprop(self) -> Tensor:
        foreach_ratio(self.v, self.inputs.grads, None, self.inputs.w, RMSPROP)
        return self.norm_sq()

    def adapt_norm_nadam(self) -> Tensor:
        foreach_ratio(self.v, self.inputs.grads, self.inputs.m, self.inputs.w, NADAM)
        return self.norm_sq()

    def adapt_norm_adadelta(self) -> Tensor:
        foreach_delta(self.v, self.inputs.grads, self.inputs.deltas, self.inputs.w, ADADELTA)
        return self.norm_sq()

    def adapt_norm_scale(self) -> Tensor:
        torch._foreach_mul_(self.v, SCALE)
        return self.norm_sq()

    def norm_sq(self) -> Tensor:
        wide = torch.promote_types(self.v[0].dtype, torch.float32)
        return torch.stack(torch._foreach_norm(self.v, dtype=wide)).double().square().sum()

    def step_size(self) -> Tensor:
        return ALPHA / self.inputs.norm_sq.sqrt()

    def plus(self, epsilon: float = EPSILON) -> None:
        torch._foreach_copy_(self.saved, self.params)
        torch._foreach_add_(self.params, self.v, alpha=epsilon)
        self.side = 1.0

    def minus(self, epsilon: float = EPSILON) -> None:
        """From theta+ to theta-, and back if called again."""
        torch._foreach_add_(self.params, self.v, alpha=-2.0 * self.side * epsilon)
        self.side = -self.side

    def restore(self) -> None:
        torch._foreach_copy_(self.params, self.saved)

    def central_difference(self) -> None:
        torch._foreach_sub_(self.v, self.inputs.grads)
        torch._foreach_mul_(self.v, -0.5 / EPSILON)

    def element_wise_part(self) -> Tensor:
        epsilon = ALPHA / self.adapt_norm_adam().sqrt()
        on_host = epsilon.item()
        self.plus(on_host)
        self.minus(on_host)
        self.restore()
        return epsilon


def foreach_adam(
    v: list[Tensor], grads: list[Tensor], m: list[Tensor], w: list[Tensor], *, lr: float, betas: tuple[float, float],
    eps: float, step: float,
) -> None:  # fmt: skip
    """v <- D v for Adam without decay, adaptation "paper" (see ops.adapt_norm_adam); 0 where w = 0.

    With h = sqrt(w) and q = h + eps sqrt(c2): D = lr sqrt(c2) / c1 [(1-b1) h - (1-b2) m g / q] / q^2, in which one q
    stands for h: a relative difference of eps / h in one term.
    """
    beta1, beta2 = betas
    c1, c2 = 1 - beta1**step, 1 - beta2**step
    rate = lr * c2**0.5 / c1
    numerator = torch._foreach_sqrt(w)
    q = torch._foreach_add(numerator, eps * c2**0.5)
    torch._foreach_mul_(numerator, rate * (1 - beta1))
    torch._foreach_addcdiv_(numerator, torch._foreach_mul(m, grads), q, value=-rate * (1 - beta2))
    torch._foreach_mul_(q, q)
    torch._foreach_div_(numerator, q)
    torch._foreach_mul_(v, numerator)


def dequantised(codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """The numbers that 8-bit codes stand for, float32, flat."""
    values = torch.nn.functional.pad(table[codes.int()], (0, -codes.numel() % PER_SCALE)).view(-1, PER_SCALE)
    return values.mul_(scales[:, None]).flatten()[: codes.numel()]


def foreach_ratio(
    v: list[Tensor], grads: list[Tensor], m: list[Tensor] | None, w: list[Tensor], row: tuple[float, ...]
) -> None:
    """v <- D v by `ops.adapt_norm_moments` in the form RATIO without eps in the numerator; 0 where w = 0.

    With h = sqrt(w) and q = kappa h + eps: D = rate kappa [slope h - kappa omega (a g + b m) g / q] / q^2, in which one
    q stands for kappa h: a relative difference of eps / h in one term.
    """
    rate, a, b, slope, kappa, omega, eps, _ = row
    numerator = torch._foreach_sqrt(w)
    q = torch._foreach_mul(numerator, kappa)
    torch._foreach_add_(q, eps)
    update = torch._foreach_mul(grads, a)
    if m is not None:
        torch._foreach_add_(update, m, alpha=b)
    torch._foreach_mul_(numerator, rate * kappa * slope)
    torch._foreach_addcdiv_(numerator, torch._foreach_mul(update, grads), q, value=-rate * kappa**2 * omega)
    torch._foreach_mul_(q, q)
    torch._foreach_div_(numerator, q)
    torch._foreach_mul_(v, numerator)


def foreach_delta(
    v: list[Tensor], grads: list[Tensor], deltas: list[Tensor], w: list[Tensor], row: tuple[float, ...]
) -> None:
    """v <- D v by `ops.adapt_norm_moments` in the form DELTA with tail = 1."""
    rate, _, _, _, kappa, omega, eps, _ = row
    spread = torch._foreach_add(w, eps)
    numerator = torch._foreach_addcmul(spread, grads, grads, value=-omega)
    torch._foreach_div_(numerator, spread)
    torch._foreach_mul_(spread, kappa)
    torch._foreach_addcmul_(spread, grads, grads, value=omega)
    size = torch._foreach_add(deltas, kappa * eps)
    torch._foreach_div_(size, spread)
    torch._foreach_sqrt_(size)
    torch._foreach_mul_(numerator, size)
    torch._foreach_mul_(numerator, rate)
    torch._foreach_mul_(v, numerator)


Contender = Library | Foreach


def fused_adam(inputs: Inputs) -> Callable[[], object]:
    """torch's own fused Adam step on the same list, as a yardstick; it keeps the moments in the parameters' dtype.

    One step is made here: the first one allocates the moments.
    """
    params = [theta.clone().requires_grad_() for theta in inputs.theta]
    for p, g in zip(params, inputs.grads, strict=True):
        p.grad = g
    optimizer = torch.optim.Adam(params, lr=1e-6, fused=True)
    optimizer.step()
    return optimizer.step
