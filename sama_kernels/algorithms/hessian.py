"""The base gradient g(theta, lambda) with its graph: products with the Hessian and with the mixed derivative."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sama_kernels import loss_checks, mask_draws
from sama_kernels.algorithms import second_derivatives
from sama_kernels.guards import Interrupts
from sama_kernels.hooks import Hooks, hooked
from sama_kernels.types import Closure

Vector = list[Tensor]
"""One tensor per base parameter."""


class BaseGradient:
    """g = dL_base/dtheta, kept with its graph.

    Arguments:
        losses: closures whose losses are summed; called once, here.
        hooks: those of theta (`unhooked` meanwhile), which are a part of g.
    Raises:
        ValueError: a loss is no scalar or reads none of the parameters.
        NotImplementedError: an operator has no second derivative.
    """

    def __init__(
        self,
        losses: Sequence[Closure],
        theta: Sequence[Tensor],
        lam: Sequence[Tensor],
        hooks: Hooks,
        interrupts: Interrupts,
    ) -> None:
        self._theta, self._lam, self._interrupts = theta, lam, interrupts
        total = torch.zeros((), device=theta[0].device)
        for loss in losses:
            with torch.enable_grad(), mask_draws.fast(loss, theta[0].device), interrupts.allowed():
                value = loss()
                loss_checks.scalar_loss("base_loss", value, "meta_params")
                total = total + value.reshape(())
        second_derivatives.check_loss("base_loss", total)
        with torch.enable_grad(), interrupts.allowed(), second_derivatives.explained():
            raw = torch.autograd.grad(total, theta, create_graph=True, allow_unused=True)
            g = [hooked(own, x) for own, x in zip(hooks, raw, strict=True)]
        second_derivatives.check_gradient(g)
        self.loss = total.detach()
        self._rows = [row for row, x in enumerate(g) if x is not None and x.requires_grad]
        self._g = [x for x in g if x is not None and x.requires_grad]
        if not self._g:
            raise ValueError("base_loss: its gradient in base_params does not depend on any parameter")

    def hessian_product(self, w: Vector) -> Vector:
        """H w; zeros for parameters that the loss does not read."""
        return self._product(self._theta, w)

    def mixed_product(self, w: Vector) -> Vector:
        """(d^2 L_base / dlambda dtheta) w, one tensor per meta parameter; zeros where lambda is not read.

        Raises:
            ValueError: no base gradient depends on lambda.
        """
        return self._product(self._lam, w, name="meta_params")

    def _product(self, inputs: Sequence[Tensor], w: Vector, name: str = "") -> Vector:
        with self._interrupts.allowed(), second_derivatives.explained():
            along = [w[row] for row in self._rows]
            found = torch.autograd.grad(self._g, inputs, along, retain_graph=True, allow_unused=True)
        if name and all(x is None for x in found):
            raise ValueError(f"{name}: the base gradient does not depend on any of them (all derivatives are None)")
        return [torch.zeros_like(x) if y is None else y.detach() for x, y in zip(inputs, found, strict=True)]


ROW = 4096  # elements whose products are summed in their own dtype: 1e-9 off in float32, where one long dot is 2e-5 off


def dot(a: Vector, b: Vector) -> Tensor:
    """<a, b>, float64, 0-dim."""
    return torch.stack([part for x, y in zip(a, b, strict=True) for part in _dots(x, y)]).sum()


def _dots(x: Tensor, y: Tensor) -> list[Tensor]:
    x, y = _wide(x.reshape(-1)), _wide(y.reshape(-1))
    rows = x.numel() // ROW * ROW
    whole = torch.linalg.vecdot(x[:rows].view(-1, ROW), y[:rows].view(-1, ROW))
    return [whole.sum(dtype=torch.float64), torch.dot(x[rows:], y[rows:]).double()]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def add_(a: Vector, factor: float | Tensor, b: Vector) -> Vector:
    """a += factor b, in place: a temporary costs a CPU more than the sum (4.5M elements: 32 ms instead of 5)."""
    if isinstance(factor, float):
        torch._foreach_add_(a, b, alpha=factor)
        return a
    for x, y, f in zip(a, b, _like(factor, b), strict=True):
        torch.addcmul(x, y, f, out=x)
    return a


def scale_add_(a: Vector, factor: Tensor, b: Vector) -> Vector:
    """a <- factor a + b, in place."""
    for x, y, f in zip(a, b, _like(factor, a), strict=True):
        torch.addcmul(y, x, f, out=x)
    return a


def _like(factor: Tensor, vector: Vector) -> list[Tensor]:
    """The factor, 0-dim, in the dtype and on the device of each tensor, cast once for each; as a number it would have
    to be read from the device."""
    cast = {key: factor.to(key[0], key[1]) for key in {(x.device, x.dtype) for x in vector}}
    return [cast[x.device, x.dtype] for x in vector]
