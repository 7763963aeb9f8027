"""`SamaFunction`: the meta loss as a differentiable function of lambda, with the SAMA gradient as its derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sama_kernels.types import MetaGradient


class SamaFunction(torch.autograd.Function):
    """L_meta(theta) whose backward with respect to lambda is the SAMA gradient.

    `SamaFunction.apply(meta_step, *meta_params)` runs `meta_step() -> MetaGradient` at once, at today's theta, and
    returns its meta loss; backward only scales the gradients by the incoming one. `sama_loss` is the friendly way in.
    """

    @staticmethod
    def forward(ctx: Any, meta_step: Callable[[], MetaGradient], *meta_params: Tensor) -> Tensor:
        """Run the meta step; the loss is 0-dim, in the dtype of the meta loss."""
        result = meta_step()
        ctx.save_for_backward(*result.grads)
        return result.meta_loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """dL_meta/dlambda times the incoming gradient (0-dim)."""
        # The product in float32: a GradScaler's scale, 65536 at first, is infinite in float16.
        return (None, *((_wide(g) * grad_output).to(g.dtype) for g in ctx.saved_tensors))


def _wide(g: Tensor) -> Tensor:
    return g.float() if g.element_size() == 2 else g
