"""`restore`: theta back from theta+ or theta-, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sama_kernels import backends
from sama_kernels.backends import reference
from sama_kernels.ops._library import define, refuse_gradients, written


def restore(params: Sequence[Tensor], v: Sequence[Tensor], *, backend: str) -> None:
    """bits(params) <- bits(params) XOR bits(v), in place, where v holds what `perturb` left in it.

    The same call again leads back to the perturbed values: XOR is its own inverse.

    Arguments:
        params: theta+ or theta-, overwritten with theta.
        v: the XOR bits; shapes and dtypes of `params`. Read only.
    Bytes moved per float32 element: 8 read + 4 written.
    """
    refuse_gradients("restore", params=params, v=v)
    backends.kernel("restore", backend)(params, v)
    written(params)


def _fake(params: Sequence[Tensor], v: Sequence[Tensor]) -> None:
    return None


define("restore(Tensor(a!)[] params, Tensor[] v) -> ()", reference=reference.restore, fake=_fake)
