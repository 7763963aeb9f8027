"""`adapt_norm`: v <- D d in place and ||v||^2, in one pass over d, g and the optimizer state (paper, Eqs. 4 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from torch import Tensor

from sama_kernels import backends
from sama_kernels.backends import reference
from sama_kernels.ops._library import define, fake_norm_sq, refuse_gradients, written
from sama_kernels.upload import refuse_captured


def adapt_norm_adam(
    v: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    params: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    mode: int,
    backend: str,
) -> Tensor:
    """v <- D d for Adam and AdamW, where D = du/dg is taken from the state AFTER the step.

    With c1 = 1 - beta1^t, c2 = 1 - beta2^t, s = sqrt(w / c2), q = s + eps, g the gradient that the moments saw
    (negated under `maximize`, plus `weight_decay` times theta before the step), r = (1 - beta1) - (1 - beta2) m g / w:

        exact:  D = lr / (c1 q^2) * (r s + (1 - beta1) eps)
        paper:  D = lr / (c1 q^2) * (r s)                       and 0 where w = 0

    which is Appendix C of the paper with beta2 where it misprints beta1, and with bias correction; computed as
    r s / q^2 = ((1 - beta1) w - (1 - beta2) m g) / (c2 s q^2), with one division. Where |r| is below
    8 ulp(1) of the moments' dtype times (1 - beta1) it is rounding noise and taken as 0: at the first step r = 0 in
    real numbers. Under amsgrad w is the running maximum, and its term counts only where this step made the maximum.

    Arguments:
        v: the direct gradients d, overwritten with D d. Any float dtype; any shapes and strides, also empty.
        grads, exp_avgs, exp_avg_sqs: g, m, w of the step, shaped like v; dtypes may differ from v's.
        max_exp_avg_sqs: amsgrad's maxima, or an empty list.
        params: theta after the step; read only if `weight_decay` is not 0, else an empty list.
        steps: the step counters t after the step, 0-dim, on the CPU or on v's device.
        lr: of the step; a 0-dim tensor is read on its device.
        weight_decay: L2 decay; 0 for decoupled decay, which does not enter D.
        mode: `reference.PAPER` or `reference.EXACT`.
    Returns:
        ||v||^2 over the list, float64, 0-dim, on v's device, of the values before they are rounded to v's dtype; summed
        in a fixed order.
    Bytes moved per float32 element: 16 read + 4 written (+ 4 read with L2 decay, + 4 read with amsgrad).
    """
    lr_tensor, lr_float = (lr, 0.0) if isinstance(lr, Tensor) else (None, lr)
    lr_tensors = () if lr_tensor is None else (lr_tensor,)
    refuse_captured(chain(steps, lr_tensors), v)
    refuse_gradients(
        "adapt_norm_adam", v=v, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs,
        max_exp_avg_sqs=max_exp_avg_sqs, params=params, lr=lr_tensors,
    )  # fmt: skip
    kernel = backends.kernel("adapt_norm_adam", backend)
    norm_sq: Tensor = kernel(
        v, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, params, steps, lr_tensor, lr_float,
        beta1, beta2, eps, weight_decay, maximize, mode,
    )  # fmt: skip
    written(v)
    return norm_sq


def adapt_norm_scale(v: Sequence[Tensor], scale: float, *, lr: Tensor | None = None, backend: str) -> Tensor:
    """v <- c d with c = scale * lr, for optimizers whose update is linear in g (SGD), and c = 1 for SAMA-NA.

    Arguments:
        v: the direct gradients d, overwritten with c d (not written where c = 1).
        lr: a learning rate that lives in a 0-dim tensor; None if it is part of `scale`.
    Returns:
        ||v||^2 over the list, float64, 0-dim, on v's device; summed in a fixed order.
    Bytes moved per float32 element: 4 read + 4 written (4 read if c = 1).
    """
    refuse_captured([] if lr is None else [lr], v)
    refuse_gradients("adapt_norm_scale", v=v, lr=[] if lr is None else [lr])
    norm_sq: Tensor = backends.kernel("adapt_norm_scale", backend)(v, lr, scale)
    written(v)
    return norm_sq


# The last argument is not called `mode` in the schema: torch.compile passes the arguments of in-place ops on by name,
# through a function of its own that has a parameter `mode`.
define(
    "adapt_norm_adam(Tensor(a!)[] v, Tensor[] grads, Tensor[] exp_avgs, Tensor[] exp_avg_sqs,"
    " Tensor[] max_exp_avg_sqs, Tensor[] params, Tensor[] steps, Tensor? lr_tensor, float lr, float beta1,"
    " float beta2, float eps, float weight_decay, bool maximize, int variant) -> Tensor",
    reference=reference.adapt_norm_adam,
    fake=fake_norm_sq,
)
define(
    "adapt_norm_scale(Tensor(a!)[] v, Tensor? scale_tensor, float scale) -> Tensor",
    reference=reference.adapt_norm_scale,
    fake=fake_norm_sq,
)
