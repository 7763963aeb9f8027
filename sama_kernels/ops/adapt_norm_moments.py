"""`adapt_norm_moments`: v <- D d and ||v||^2 for the optimizers between SGD and Adam, by the form of their update."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sama_kernels import backends
from sama_kernels.backends import reference
from sama_kernels.ops._library import define, fake_norm_sq, refuse_gradients, written


def adapt_norm_moments(
    v: Sequence[Tensor],
    grads: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    params: Sequence[Tensor],
    buffers: Sequence[Tensor],
    coefficients: Tensor,
    *,
    weight_decay: float,
    maximize: bool,
    form: int,
    backend: str,
) -> Tensor:
    """v <- D d with D = du/dg of an update u = rate N / q, N = a g + b m, from the state AFTER the step.

    g is the gradient that the moments saw (negated under `maximize`, plus `weight_decay` times theta before the step).
    With slope = dN/dg = a + b dm/dg and the step's second moment w or maximum n:

        LINEAR    D = rate slope                                                               (ASGD)
        RATIO     q = kappa s + eps,  s = sqrt(w),  dw/dg = 2 omega g,  r = slope w - omega N g
                  D = rate [kappa r / (s q^2) + slope tail / q^2]              (NAdam, RAdam, Adagrad, RMSprop)
        CENTERED  as RATIO with N = a g, w - m^2 for w and r = slope (w - m^2) - omega N (g - m); m is the mean of g
                                                                                    (centered RMSprop)
        MAXIMUM   q = n,  r = slope |g| - N sign(g)
                  D = rate [r + slope tail] / n^2 where this step made the maximum, n = |g| + eps;
                  D = rate slope / n elsewhere                                                 (Adamax)
        DELTA     u = rate delta,  delta = g sqrt((e + eps) / (w + eps)), with e the mean of delta^2 before the step and
                  m = kappa e + omega delta^2 the one after it, w likewise of g^2;  a = slope = 1
                  D = rate delta/g (r + eps) / (w + eps),  r = w - omega g^2
                  with (delta/g)^2 = (m + kappa eps) / (kappa (w + eps) + omega g^2)           (Adadelta)

    `tail` = eps is the derivative to the letter; `tail` = 0 drops eps from the numerator, as the paper does for Adam,
    which makes D 0 where w = 0 and in untouched cells of MAXIMUM. kappa = 0, eps = tail = 1 is an update without a
    second moment (RAdam before it rectifies). DELTA owes the size of its steps to eps and keeps it: there `tail` = 1 is
    the derivative to the letter, and `tail` = 0 makes D 0 in the cells that the step did not see, grad = u = 0.

    Where |r| is below 8 ulp(1) times |slope| w it is rounding noise and taken as 0: at a first step r is 0 in real
    numbers. A maximum was made by this step if it is |g| + eps to within 1 ulp(1) of itself, or with weight decay
    2 ulp(1) of itself + |weight_decay theta|, of which g is made. ulp(1) is that of the state's dtype, or that of the
    arithmetic (float64 if v is, else float32) if it is larger.

    Coupled decay needs theta before the step, which was theta + u: as u is linear in g once q is known,
    g (q - weight_decay rate a) = q (+-grad + weight_decay theta) + weight_decay rate b m. Where q is close to
    weight_decay rate a the step has forgotten theta; |g| is therefore held to what the state allows, sqrt(w / omega)
    or n. With `buffers` the step was theta <- theta - rate buffer (RMSprop with momentum), and theta is explicit.

    In DELTA u is not linear in g: y = g sqrt(omega / (w + eps)), held to what w allows as well, solves
    y = known + pull y / sqrt(kappa + y^2), with known = (+-grad + weight_decay theta) sqrt(omega / (w + eps)) and
    pull = weight_decay rate sqrt((m + kappa eps) / (w + eps)), which is done by five steps of Halley's method from
    y = known. A cell without a gradient of its own loses the fraction pull / sqrt(kappa) of theta: up to 0.99 the error
    is that of rounding (after four steps up to 0.95 and 2e-7 of y at 0.99; Newton's method takes eight), at 0.999 it is
    8e-7. From 1 on, several g may have led to this theta; D is finite.

    Arguments:
        v: the direct gradients d, overwritten with D d. Any float dtype; any shapes and strides, also empty.
        grads, seconds: g and w (or n) of the step, shaped like v; dtypes may differ from v's. LINEAR: not read.
        firsts: m. DELTA: the mean of delta^2. RATIO: may be an empty list where b = 0. LINEAR: not read.
        params: theta after the step; read only if `weight_decay` is not 0, else an empty list.
        buffers: momentum buffers after the step, read only if `weight_decay` is not 0; or an empty list. In RATIO
            without `firsts` and in CENTERED.
        coefficients: float64, contiguous, shape (len(v), 8), on v's device; of each tensor rate, a, b, slope, kappa,
            omega, eps, tail.
        weight_decay: L2 decay; 0 for decoupled decay, which does not enter D.
        form: `reference.LINEAR`, `RATIO`, `CENTERED`, `MAXIMUM` or `DELTA`.
    Returns:
        ||v||^2 over the list, float64, 0-dim, on v's device, of the values before they are rounded to v's dtype; summed
        in a fixed order.
    Bytes moved per float32 element: 12 read + 4 written (+ 4 read for each of firsts, params, buffers); LINEAR: 4 + 4.
    """
    refuse_gradients(
        "adapt_norm_moments", v=v, grads=grads, firsts=firsts, seconds=seconds, params=params, buffers=buffers,
        coefficients=[coefficients],
    )  # fmt: skip
    kernel = backends.kernel("adapt_norm_moments", backend)
    norm_sq: Tensor = kernel(v, grads, firsts, seconds, params, buffers, coefficients, weight_decay, maximize, form)
    written(v)
    return norm_sq


define(
    "adapt_norm_moments(Tensor(a!)[] v, Tensor[] grads, Tensor[] firsts, Tensor[] seconds, Tensor[] params,"
    " Tensor[] buffers, Tensor coefficients, float weight_decay, bool maximize, int form) -> Tensor",
    reference=reference.adapt_norm_moments,
    fake=fake_norm_sq,
)
