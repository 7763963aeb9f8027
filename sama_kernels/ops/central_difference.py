"""`central_difference`: the meta gradient from the two perturbed passes (paper, Eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sama_kernels import backends
from sama_kernels.backends import reference
from sama_kernels.ops._library import define, refuse_gradients, written


def central_difference(
    grads_plus: Sequence[Tensor],
    grads_minus: Sequence[Tensor],
    explicit: Sequence[Tensor],
    epsilon: Tensor,
    norm: Tensor,
    *,
    backend: str,
) -> None:
    """grads_plus <- -(grads_plus - grads_minus) / (2 epsilon) + explicit, in place.

    Arguments:
        grads_plus, grads_minus: dL_base(theta+-)/dlambda, one per meta parameter, same shapes and dtypes.
        explicit: dL_meta/dlambda where the meta loss reads lambda, one per meta parameter, or an empty list.
        epsilon, norm: from `step_size`. With epsilon 0 (degenerate) the difference counts as 0; with a norm that is
            not finite so does `explicit`, which came out of the same broken backward pass.
    Bytes moved per float32 element: 8 read + 4 written (+ 4 read with `explicit`).
    """
    scalars = {"epsilon": [epsilon], "norm": [norm]}
    refuse_gradients("central_difference", grads_plus=grads_plus, grads_minus=grads_minus, explicit=explicit, **scalars)
    backends.kernel("central_difference", backend)(grads_plus, grads_minus, explicit, epsilon, norm)
    written(grads_plus)


def _fake(
    grads_plus: Sequence[Tensor],
    grads_minus: Sequence[Tensor],
    explicit: Sequence[Tensor],
    epsilon: Tensor,
    norm: Tensor,
) -> None:
    return None


define(
    "central_difference(Tensor(a!)[] grads_plus, Tensor[] grads_minus, Tensor[] explicit, Tensor epsilon,"
    " Tensor norm) -> ()",
    reference=reference.central_difference,
    fake=_fake,
)
