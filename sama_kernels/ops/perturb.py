"""`perturb`: theta -> theta+ -> theta-, in place, keeping in v's storage what brings theta back bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sama_kernels import backends
from sama_kernels.backends import reference
from sama_kernels.ops._library import define, written


def perturb(params: Sequence[Tensor], v: Sequence[Tensor], epsilon: Tensor, side: int, *, backend: str) -> None:
    """Move theta to theta+ = theta + epsilon v (side PLUS), then from there to theta- (side MINUS).

    v's storage changes meaning: after either side it holds bits(theta) XOR bits(theta+-), from which `restore` gets
    theta back exactly and without another buffer of the model's size. theta- is theta - (theta+ - theta): the mirror
    image of the step that was realised after rounding, so both sides are the same distance away. Cells with
    XOR bits of zero do not move, hence epsilon = 0 (degenerate) leaves every bit of theta as it is.

    Arguments:
        params: theta (PLUS) or theta+ (MINUS), changed in place; float32, float64, bfloat16 or float16.
        v: v (PLUS) or the XOR bits that PLUS left (MINUS), overwritten; shapes and dtypes of `params`.
        epsilon: from `step_size`, float64, 0-dim, on the device of `params`; MINUS does not read it.
        side: `reference.PLUS` or `reference.MINUS`.
    Bytes moved per float32 element: 8 read + 8 written, for each side.
    """
    backends.kernel("perturb", backend)(params, v, epsilon, side)
    written([*params, *v])


def _fake(params: Sequence[Tensor], v: Sequence[Tensor], epsilon: Tensor, side: int) -> None:
    return None


define(
    "perturb(Tensor(a!)[] params, Tensor(b!)[] v, Tensor epsilon, int side) -> ()",
    reference=reference.perturb,
    fake=_fake,
)
