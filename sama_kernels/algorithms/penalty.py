"""First-order methods that put the base level into the meta loss as a penalty: F2SA and BOME.

They move theta themselves, so they have a step of their own instead of a place in `meta_grad`. Its meta gradient goes
to the `.grad` of lambda, for an optimizer of the user's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sama_kernels import checks, loss_checks
from sama_kernels.algorithms.hessian import dot
from sama_kernels.algorithms.second_derivatives import check_loss
from sama_kernels.algorithms.substitution import places, substituted
from sama_kernels.buffers import BufferGuard
from sama_kernels.guards import RngState
from sama_kernels.hooks import gradient_hooks, hooked, unhooked
from sama_kernels.reach import reachable
from sama_kernels.types import Closure

Params = nn.Module | Iterable[Tensor | nn.Module]


@dataclass(frozen=True)
class PenaltyStep:
    """What a step found; 0-dim tensors, detached.

    Attributes:
        meta_loss, base_loss: at theta, before it moves.
        solution_loss: the base loss at the approximate solution of the base level.
        multiplier: what the penalty was weighted with.
    """

    meta_loss: Tensor
    base_loss: Tensor
    solution_loss: Tensor
    multiplier: Tensor


class _Penalty:
    _inner_lr: float
    _inner_steps: int

    def __init__(self, base_params: Params, meta_params: Params) -> None:
        self._theta = checks.tensors("base_params", base_params, skip_frozen=True)
        self._lam = checks.tensors("meta_params", meta_params, skip_frozen=False)
        checks.leaves("base_params", self._theta)
        checks.leaves("meta_params", self._lam)
        checks.disjoint(self._theta, self._lam, (base_params, meta_params))
        self._roots = (base_params, meta_params)

    def _look(self, base_loss: Closure, meta_loss: Closure) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise NotImplementedError(
                f"{type(self).__name__} exchanges nothing between processes, whose theta and lambda would drift apart;"
                " run it in one process, or use SAMA"
            )
        reach = reachable((base_loss, meta_loss, *self._roots))
        self._modules, self._generators = tuple(reach.modules), tuple(reach.generators)
        self._places = places(self._modules, self._theta)

    def _gradients(self, name: str, loss: Closure, theta: Sequence[Tensor] | None = None) -> _Gradients:
        """Of a loss in theta and lambda, at theta or at other values, of which buffers then know nothing."""
        at = self._theta if theta is None else theta
        with ExitStack() as stack:
            if theta is not None:
                stack.enter_context(BufferGuard(self._modules, self._theta))
                stack.enter_context(substituted(self._places, at))
            value = loss()
            loss_checks.scalar_loss(name, value, "base_params")
            check_loss(name, value, at, self._theta)
            with unhooked(self._lam):
                found = torch.autograd.grad(value, (*at, *self._lam), allow_unused=True)
        of_theta: list[Tensor | None] = list(found[: len(at)])
        if theta is not None:
            of_theta = [hooked(gradient_hooks(p), g) for p, g in zip(self._theta, of_theta, strict=True)]
        of_lam = found[len(at) :]
        reads_lam = any(g is not None for g in of_lam)
        return _Gradients(value.detach(), _filled(of_theta, at), _filled(of_lam, self._lam), reads_lam)

    def _passes(
        self, base_loss: Closure, meta_loss: Closure, start: Sequence[Tensor]
    ) -> tuple[list[Tensor], _Gradients, _Gradients, _Gradients]:
        """z, the end of the inner steps from `start`; the meta loss at theta; the base loss at theta and at z. All
        passes of the base loss draw the same dropout masks; the generators are left as one of them and the meta loss
        leave them, so that the next step draws others; after an error as they were."""
        torch.clear_autocast_cache()  # it may hold theta and lambda as they were before the last step
        with RngState(self._generators) as rng, BufferGuard(self._modules, self._theta) as buffers:
            z = self._descend(base_loss, start, rng)
            rng.restore()
            here = self._gradients("base_loss", base_loss)
            rng.restore()
            there = self._gradients("base_loss", base_loss, z)
            outer = self._gradients("meta_loss", meta_loss)
            if not (here.reads_lam or outer.reads_lam):
                raise ValueError("meta_params: neither base_loss nor meta_loss reads any of them")
            after, bring_buffers = rng.now(), buffers.moved()
        after.restore()
        bring_buffers()
        return z, outer, here, there

    def _descend(self, base_loss: Closure, z: Sequence[Tensor], rng: RngState) -> list[Tensor]:
        """Gradient steps on the base loss, from z."""
        z = [x.detach() for x in z]
        for _ in range(self._inner_steps):
            rng.restore()
            grads = self._gradients("base_loss", base_loss, [x.requires_grad_() for x in z]).theta
            z = [x.detach() - self._inner_lr * g for x, g in zip(z, grads, strict=True)]
        return [x.requires_grad_() for x in z]

    def _move(self, theta_direction: Sequence[Tensor], lam_gradient: Sequence[Tensor], lr: float) -> None:
        with torch.no_grad():
            torch._foreach_add_(self._theta, list(theta_direction), alpha=-lr)
        torch.clear_autocast_cache()
        torch.autograd.backward(self._lam, list(lam_gradient))


@dataclass
class _Gradients:
    loss: Tensor
    theta: list[Tensor]
    lam: list[Tensor]
    reads_lam: bool


class F2SA(_Penalty):
    """Fully first-order stochastic approximation (Kwon, Kwon, Wright and Nowak, "A fully first-order method for
    stochastic bilevel optimization", 2023, Algorithm 1).

    Beside theta it keeps z, which follows the solution of the base level. One step:
    z <- z - inner_lr dL_base(z)/dz, `inner_steps` times;
    theta <- theta - lr (dL_meta/dtheta + m dL_base(theta)/dtheta);
    gradient of lambda: dL_meta/dlambda + m (dL_base(theta)/dlambda - dL_base(z)/dlambda); m <- m + growth.
    Its error is of order 1/m, once theta and z have settled: lambda must move by less than they do.
    Cost: (inner_steps + 3) * 3 F; memory beyond theta: 4 n.

    Arguments:
        base_params, meta_params: as in `meta_grad`; theta in modules that the closures reach.
        lr: of theta; with a large multiplier it has to be small. inner_lr: of z. multiplier, growth: m and its growth.
    """

    def __init__(
        self,
        base_params: Params,
        meta_params: Params,
        *,
        lr: float,
        inner_lr: float,
        inner_steps: int = 1,
        multiplier: float = 1.0,
        growth: float = 0.0,
    ) -> None:
        super().__init__(base_params, meta_params)
        self._lr, self._inner_lr = checks.positive("lr", lr), checks.positive("inner_lr", inner_lr)
        self._inner_steps = _steps("inner_steps", inner_steps)
        self.multiplier = checks.positive("multiplier", multiplier)
        self._growth = _not_negative("growth", growth)
        self.z = [p.detach().clone() for p in self._theta]

    def step(self, base_loss: Closure, meta_loss: Closure) -> PenaltyStep:
        """Moves theta and z, and adds to the `.grad` of lambda."""
        self._look(base_loss, meta_loss)
        m = self.multiplier
        z, outer, here, there = self._passes(base_loss, meta_loss, self.z)
        self._move(
            [f + m * g for f, g in zip(outer.theta, here.theta, strict=True)],
            [f + m * (g - h) for f, g, h in zip(outer.lam, here.lam, there.lam, strict=True)],
            self._lr,
        )
        self.z = [x.detach() for x in z]
        self.multiplier = m + self._growth
        return PenaltyStep(outer.loss, here.loss, there.loss, torch.full_like(outer.loss, m))

    def state_dict(self) -> dict[str, Any]:
        """z and the multiplier."""
        return {"z": [x.clone() for x in self.z], "multiplier": self.multiplier}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        for x, saved in zip(self.z, state["z"], strict=True):
            x.copy_(saved)
        self.multiplier = float(state["multiplier"])


class BOME(_Penalty):
    """Bilevel optimization made easy (Liu, Ye, Wright, Stone and Liu, NeurIPS 2022, Algorithm 1).

    With theta_T from `inner_steps` gradient steps on the base loss, begun at theta, q = L_base(theta) - L_base(theta_T)
    (theta_T held): both levels descend along dL_meta + m dq with m = max((eta |dq|^2 - <dL_meta, dq>) / |dq|^2, 0),
    the inner products being over theta and lambda. Cost: (inner_steps + 3) * 3 F; memory beyond theta: 5 n.

    Arguments:
        lr: of theta. inner_lr: of the inner steps. eta: how strongly q has to fall.
    """

    def __init__(
        self,
        base_params: Params,
        meta_params: Params,
        *,
        lr: float,
        inner_lr: float,
        inner_steps: int = 10,
        eta: float = 0.5,
    ) -> None:
        super().__init__(base_params, meta_params)
        self._lr, self._inner_lr = checks.positive("lr", lr), checks.positive("inner_lr", inner_lr)
        self._inner_steps, self._eta = _steps("inner_steps", inner_steps), checks.positive("eta", eta)

    def step(self, base_loss: Closure, meta_loss: Closure) -> PenaltyStep:
        """Moves theta, and adds to the `.grad` of lambda. Nothing is kept from one step to the next."""
        self._look(base_loss, meta_loss)
        _, outer, here, there = self._passes(base_loss, meta_loss, self._theta)
        q_lam = [g - h for g, h in zip(here.lam, there.lam, strict=True)]
        f, q = [*outer.theta, *outer.lam], [*here.theta, *q_lam]
        square = dot(q, q)
        m = torch.where(square > 0, ((self._eta * square - dot(f, q)) / square).clamp(min=0), 0.0)
        self._move(
            [a + (m * b).to(a.dtype) for a, b in zip(outer.theta, here.theta, strict=True)],
            [a + (m * b).to(a.dtype) for a, b in zip(outer.lam, q_lam, strict=True)],
            self._lr,
        )
        return PenaltyStep(outer.loss, here.loss, there.loss, m)


def _filled(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if g is None else g for p, g in zip(like, grads, strict=True)]


def _steps(name: str, value: int) -> int:
    if checks.integer(name, value) < 1:
        raise ValueError(f"{name}: must be at least 1, got {value}")
    return value


def _not_negative(name: str, value: float) -> float:
    return 0.0 if value == 0 else checks.positive(name, value)
