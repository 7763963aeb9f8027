"""The small data classes that travel between the modules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Closure = Callable[[], Tensor]
"""Takes nothing, returns a scalar loss; is called again at the perturbed parameters."""


def as_tensor(x: float | Tensor) -> Tensor:
    """A tensor as it is, where it is; a number on the CPU. torch.as_tensor moves both to torch's default device."""
    return x if isinstance(x, Tensor) else torch.tensor(x, device="cpu")


@dataclass(frozen=True)
class Relative:
    """A length that is given as a fraction of ||theta||_2; `relative` makes it."""

    fraction: float

    def __post_init__(self) -> None:
        if not isinstance(self.fraction, int | float) or isinstance(self.fraction, bool):
            raise TypeError(f"relative: expected a number, got {type(self.fraction).__name__}")
        if not (self.fraction > 0 and math.isfinite(self.fraction)):
            raise ValueError(f"relative: the fraction of ||theta|| must be positive and finite, got {self.fraction}")


def relative(fraction: float) -> Relative:
    """alpha = fraction * ||theta||_2, the norm of all base parameters as they are at the meta step.

    ``alpha=sk.relative(1e-3)`` keeps its meaning while theta grows and from one model to the next. The norm is computed
    on the device by one read of theta (the same bits every time), and is not copied to the host.

    Arguments:
        fraction: > 0; 1e-3 suits most models in float32.
    Raises:
        TypeError, ValueError: `fraction` is no number, or not positive and finite.
    """
    return Relative(fraction)


@dataclass(frozen=True)
class MetaGradient:
    """What `meta_grad` returns. The tensors live on the device of the parameters; none was copied to the host.

    Attributes:
        grads: dL_meta/dlambda, one per meta parameter, in their shapes and dtypes; zeros where a loss does not read it.
        meta_loss: L_meta(theta), 0-dim, detached.
        base_loss_plus, base_loss_minus: L_base(theta+-, lambda), summed over microbatches, 0-dim, detached. With
            difference="forward" base_loss_minus is the loss at theta, and with "exact" so are both.
        norm: ||v||_2 over all base parameters, float64, 0-dim.
        epsilon: the step size alpha / norm, float64, 0-dim; 0 if degenerate. difference="exact" takes no step; it is
            then the one that update_base makes.
        degenerate: bool, 0-dim. True if the norm is zero, tiny or not finite, or if alpha is relative to a ||theta||
            that is zero or not finite; `grads` then holds no derivative of L_base (zeros, plus the explicit
            dL_meta/dlambda if the norm was finite) and theta was not moved. Also True, with zeros alone, if a
            GradScaler skipped the base step or a scaled gradient overflowed (`grad_scaler`).
        realised: how much of the step epsilon v survived its rounding to the parameters' dtypes: <s, epsilon v> /
            ||epsilon v||^2 with s = theta+ - theta, float64, 0-dim; 1 is all of it. The finite difference is too small
            by about this factor: below 0.9 use rounding="stochastic" or a larger alpha. None if no base parameter is
            bfloat16 or float16, and with difference="exact", which takes no step; NaN if degenerate.
        alignment: the cosine of s and v, likewise. It is what stochastic rounding does not mend: a lower one means a
            noisier gradient.
    """

    grads: tuple[Tensor, ...]
    meta_loss: Tensor
    base_loss_plus: Tensor
    base_loss_minus: Tensor
    norm: Tensor
    epsilon: Tensor
    degenerate: Tensor
    realised: Tensor | None = None
    alignment: Tensor | None = None


@dataclass(frozen=True)
class Clipping:
    """What was done to the gradient between backward and step (`sama_kernels.clipping`).

    Attributes:
        coef: what clip_grad_norm_ multiplied it by, float64, 0-dim, on the parameters' device; None if it did not run.
        rank_one: whether the derivative of the norm itself is part of du/dg.
        value: the bound of clip_grad_value_; None if it did not run.
    """

    coef: Tensor | None = None
    rank_one: bool = False
    value: float | None = None


@dataclass(frozen=True)
class Synchronisation:
    """How several processes make one meta step: the arguments of `meta_grad`.

    Attributes:
        sync: "final" or "full".
        weight: of this rank's base and meta loss; None: the same on all ranks.
    """

    sync: str
    group: Any
    weight: tuple[float, float] | None
    bucket_mib: float
    comm_hook: Any


@dataclass(frozen=True)
class Problem:
    """The checked arguments of one meta step."""

    base_losses: tuple[Closure, ...]
    meta_loss: Closure
    base_params: tuple[Tensor, ...]
    meta_params: tuple[Tensor, ...]
    compiled: bool
    optimizer: torch.optim.Optimizer | None
    alpha: float | Relative
    adaptation: str
    update_base: bool
    hold: str
    rounding: int
    seed: int
    difference: str
    backend: str
    algorithm: str
    """With its options, for the other ranks."""
    clipping: Clipping = Clipping()
    loss_scale: Tensor | None = None
    """What every loss is multiplied by before it is differentiated, float32, 0-dim; None: 1."""
    skipped: bool | Tensor = False
    """Whether the base step was skipped; a tensor (not 0: skipped) if the host does not know."""
    master_params: tuple[Tensor, ...] | None = None
    synchronisation: Synchronisation | None = None
    """None: this process is alone."""
    reached: tuple[torch.nn.Module, ...] = ()
    """All modules that were found, those that only the closures know too."""
    generators: tuple[object, ...] = ()
    """Random number generators of the caller's own that the closures reach."""
    fsdp: tuple[Any, ...] = ()
    """Those of them that `fully_shard` was called on."""
    owned: dict[int, Tensor] = field(default_factory=dict)
    """The parameters that those gather, by id; their gradients come averaged, and through `.backward()` alone."""

    @property
    def step_params(self) -> tuple[Tensor, ...]:
        """What the optimizer steps: base_params, or the master copies of them."""
        return self.base_params if self.master_params is None else self.master_params

    @property
    def step_params_name(self) -> str:
        """The argument that `step_params` came from."""
        return "base_params" if self.master_params is None else "master_params"

    def scaled(self, loss: Tensor, factor: float | Tensor = 1.0) -> Tensor:
        """`loss` as it is differentiated: times the scale of the GradScaler, where there is one, and `factor`."""
        if self.loss_scale is not None:
            factor = self.loss_scale * factor
        if isinstance(factor, float) and factor == 1.0:
            return loss
        with torch.enable_grad():
            return loss * factor

    @property
    def tiny(self) -> float:
        """Norms up to this are zero: below it alpha / norm, or v itself, leaves the range of the arithmetic."""
        return 1e-290 if all(p.dtype == torch.float64 for p in self.base_params) else 1e-30
