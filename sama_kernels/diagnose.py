"""`diagnose`: is the meta gradient of one batch right, and if not, is it alpha, precision, degeneracy or a detach?

A tool, not a part of training: it makes ten to thirty meta steps and copies figures to the host. Everything is measured
through `meta_grad` itself, so that it is measured on the very passes that training makes.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from sama_kernels import adaptation as adaptations
from sama_kernels import checks
from sama_kernels.algorithms import Sama, SamaNA
from sama_kernels.algorithms.options import resolve
from sama_kernels.detach_watch import DetachWatch
from sama_kernels.diagnosis import Diagnosis, degenerate, judge
from sama_kernels.graphs import is_once_differentiable
from sama_kernels.guards import Interrupts
from sama_kernels.integrations.optimizers import scaler_of, unwrapped
from sama_kernels.jvp import uncompiled
from sama_kernels.ladder import climb, error
from sama_kernels.meta_gradient import called_like, meta_grad
from sama_kernels.types import Closure, MetaGradient, Relative

_SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum")  # Adam and its kin, RMSprop, Adagrad


@called_like(meta_grad)
def diagnose(*args: Any, **kwargs: Any) -> Diagnosis:
    """Compare the meta gradient of this batch with an exact one, and say in words and numbers what is the matter.

    Call it in place of `meta_grad` (after a base step, while `.grad` is still there), with the same arguments; the
    verdict is about the `difference` that they ask for. Of several processes it looks at the batch of this one alone.
    ``print(sk.diagnose(...))``.

    The central difference at alpha, alpha/2 and a ladder of others is compared with the exact derivative in forward
    mode; by double backward where an operator has no forward mode; where neither is possible, with an extrapolation of
    the ladder, and the result says why. It also looks at the norm of v and where v is, at what bfloat16 or float16
    realise of the step, at how many digits the difference loses, and for plain detaches.
    Returns:
        `Diagnosis`. Slow (10 to 30 meta steps), with memory for four more copies of theta (more with double backward),
        and it waits for the device. Everything is left as `meta_grad` leaves it, bit for bit.
    Raises:
        ValueError: `algorithm` is not SAMA. What `meta_grad` raises.
    """
    arguments = inspect.signature(meta_grad).bind(*args, **kwargs).arguments
    difference = arguments.pop("difference", "central")
    checks.choice("difference", difference, checks.DIFFERENCES)
    arguments.pop("update_base", None)  # the meta gradient does not depend on it
    arguments["sync"] = "none"
    optimizer = arguments.get("optimizer")
    arguments["grad_scaler"] = scaler_of(optimizer, arguments.get("grad_scaler"))
    arguments["optimizer"] = unwrapped(optimizer)
    algorithm = resolve(arguments.get("algorithm", "sama"))
    if not isinstance(algorithm, Sama | SamaNA):
        raise ValueError(
            f"algorithm: diagnose is about SAMA's difference, which {type(algorithm).__name__} does not make"
        )
    for name in ("base_params", "meta_params", "master_params"):
        arguments[name] = checks.reusable(arguments.get(name))
    # Forward mode needs eager code, and compiled code may draw other dropout masks.
    with Interrupts() as interrupts, uncompiled(), interrupts.allowed():
        return _Patient(arguments, difference).examine()


class _Patient:
    """One batch, and what is measured on it."""

    def __init__(self, arguments: dict[str, Any], difference: str) -> None:
        self._arguments, self._asked = arguments, difference
        self._theta = checks.tensors("base_params", arguments["base_params"], skip_frozen=True)
        self._lam = checks.tensors("meta_params", arguments["meta_params"], skip_frozen=False)
        self._losses = checks.closures("base_loss", arguments["base_loss"])
        self._why_not: dict[str, str] = {}

    def examine(self) -> Diagnosis:
        sixteen_bit = any(p.element_size() == 2 for p in (*self._theta, *self._lam))
        linear, v = self._direction()
        norm, epsilon = float(linear.norm), float(linear.epsilon)
        alpha = epsilon * norm if epsilon else 0.0
        facts = Diagnosis(
            alpha=alpha, difference=self._asked, theta_norm=_norm(self._theta), norm=norm, epsilon=epsilon
        )
        if linear.degenerate:
            return degenerate(facts, *self._no_direction(norm))
        self._explicit = _flat(linear.grads[: len(self._lam)])
        reference, kind = self._exact(v)
        gradient, forward, detached = self._look()
        if words := _not_finite(forward, gradient, reference):
            return degenerate(facts, words, "look for the first value in base_loss, or in theta, that is not finite")
        change = 0.0 if reference is None else float(reference.norm()) / norm * facts.theta_norm
        if reference is not None and change <= 1e-2 * self._epsilon_of_lambda() * float(gradient.norm()):
            words = "dL_base/dlambda does not change along v, so lambda has no influence on the meta loss"
            return degenerate(facts, words, "check that base_loss combines lambda with what theta computes")
        steps: dict[float, MetaGradient] = {}

        def difference(at: float) -> Tensor:
            steps[at] = self._run(difference="central", alpha=at)
            return self._difference(steps[at])

        rounding = max(torch.finfo(p.dtype).eps for p in self._theta)
        ladder, reference = climb(difference, alpha, rounding * facts.theta_norm, facts.theta_norm, reference)
        at_alpha = steps[alpha]
        kind = kind or ("none" if reference is None else "extrapolation")
        loss = float(forward.base_loss_minus)
        lost = float((2 * epsilon * self._difference(at_alpha)).norm() / gradient.norm()) if gradient.norm() else 0.0
        facts = replace(
            facts,
            error=error(self._difference(at_alpha), reference),
            error_forward=error(self._difference(forward), reference),
            reference=kind, why_not=self._why_not, ladder=ladder, base_loss=loss,
            change_plus=float(at_alpha.base_loss_plus) - loss, change_minus=float(at_alpha.base_loss_minus) - loss,
            agreeing_digits=max(0.0, -math.log10(lost)) if lost > 0 else None,
            of_digits=-math.log10(self._epsilon_of_lambda()),
            realised=None if at_alpha.realised is None else float(at_alpha.realised),
            alignment=None if at_alpha.alignment is None else float(at_alpha.alignment),
            largest=self._largest(v), untouched=self._untouched(v), detached=detached,
        )  # fmt: skip
        return judge(facts, sixteen_bit=sixteen_bit)

    def _epsilon_of_lambda(self) -> float:
        return max(torch.finfo(p.dtype).eps for p in self._lam)

    def _run(self, base_loss: Any = None, **changes: Any) -> MetaGradient:
        arguments = {**self._arguments, **changes}
        arguments["base_loss"] = self._losses if base_loss is None else base_loss
        return meta_grad(**arguments)

    def _difference(self, out: MetaGradient) -> Tensor:
        """The part of the meta gradient that comes from the base loss."""
        return _flat(out.grads) - self._explicit

    def _direction(self) -> tuple[MetaGradient, list[Tensor]]:
        """The meta step of the base loss <theta, mu>, whose mixed derivative along v is v itself: ||v||, epsilon, the
        explicit gradients, and v."""
        mu = [torch.zeros_like(p, requires_grad=True) for p in self._theta]

        def linear() -> Tensor:
            products = [(p * m).sum().float() for p, m in zip(self._theta, mu, strict=True)]
            return torch.stack(products).sum()

        out = self._run(linear, meta_params=[*self._lam, *mu], difference="exact")
        return out, [-g for g in out.grads[len(self._lam) :]]

    def _no_direction(self, norm: float) -> tuple[str, str]:
        """Why v has no usable length, and the cure."""
        if not math.isfinite(norm):
            words = "||v|| is not finite: the meta loss, a .grad or the optimizer's state holds NaN or infinity"
            return words, "look for the first loss or gradient that is not finite"
        if norm == 0 and self._arguments.get("grad_scaler") is not None:
            words = "||v|| is 0: the GradScaler skipped this base step, or the scaled gradients overflowed"
            return words, "diagnose the next step that is made; once in a while this is normal"
        theta_norm = _norm(self._theta)
        if norm > 0 and isinstance(self._arguments.get("alpha"), Relative) and not 0 < theta_norm < math.inf:
            return f"alpha is relative, and ||theta|| is {theta_norm}", "give an absolute alpha"
        optimizer = self._arguments.get("optimizer")
        if _is_adam(optimizer) and adaptations.steps_made(optimizer) == 1:
            words = (
                f"||v|| is {norm:.1e} after the optimizer's first step, where Adam's D is zero by nature: that update"
                " is a sign, which does not change with the gradient"
            )
            return words, "begin with the meta steps after a few base steps"
        words = (
            f"||v|| is {norm:.1e}: the meta loss has no gradient where the optimizer moves theta, or D is zero there"
        )
        return words, "check that the meta loss reads theta; 16-bit optimizer states round second moments to zero"

    def _exact(self, v: list[Tensor]) -> tuple[Tensor | None, str | None]:
        """The exact derivative and how it was found; None if it could not be."""
        try:
            return self._difference(self._run(difference="exact")), "forward mode"
        except NotImplementedError as error:
            self._why_not["forward mode"] = str(error)
        try:
            return self._double_backward(v), "double backward"
        except RuntimeError as error:
            self._why_not["double backward"] = str(error).partition("\n")[0]
        return None, None

    def _double_backward(self, v: list[Tensor]) -> Tensor:
        """-d/dlambda <dL_base/dtheta, v>, inside the pass at theta of a forward difference."""
        total = torch.zeros_like(self._explicit)

        def differentiate(closure: Closure) -> Tensor:
            try:
                for p in self._theta:
                    p.requires_grad_(True)
                loss = closure()
                g = torch.autograd.grad(loss, self._theta, create_graph=True, allow_unused=True)
                if is_once_differentiable([x for x in g if x is not None]):
                    raise RuntimeError("an autograd.Function of base_loss is once_differentiable")
            finally:
                for p in self._theta:
                    p.requires_grad_(False)
            along = sum(((a * b).sum() for a, b in zip(g, v, strict=True) if a is not None), loss.new_zeros(()))
            if along.requires_grad:
                grads = torch.autograd.grad(-along, self._lam, retain_graph=True, allow_unused=True)
                total.add_(_flat(grads, like=self._lam))
            return loss

        self._run(self._at_theta(differentiate), difference="forward")
        return total

    def _look(self) -> tuple[Tensor, MetaGradient, bool]:
        """dL_base/dlambda at theta, the forward difference, and whether a plain detach was seen."""
        gradient, watches = torch.zeros_like(self._explicit), []

        def watch(closure: Closure) -> Tensor:
            with Interrupts() as interrupts, DetachWatch(self._theta) as watching, interrupts.allowed():
                loss = closure()
            watches.append(watching)
            grads = torch.autograd.grad(loss, self._lam, retain_graph=True, allow_unused=True)
            gradient.add_(_flat(grads, like=self._lam))
            return loss

        out = self._run(self._at_theta(watch), difference="forward")
        return gradient, out, any(watching.found for watching in watches)

    def _at_theta(self, examine: Callable[[Closure], Tensor]) -> list[Closure]:
        """The base losses, which in the first pass of a forward difference, at theta, go through `examine`."""

        def examined(closure: Closure) -> Closure:
            calls: list[None] = []

            @functools.wraps(closure, updated=())
            def wrapper() -> Tensor:
                calls.append(None)
                return examine(closure) if len(calls) == 1 else closure()

            if (recording := getattr(closure, "recording", None)) is not None:  # its held values
                wrapper.recording = recording  # type: ignore[attr-defined]
            return wrapper

        return [examined(closure) for closure in self._losses]

    def _largest(self, v: list[Tensor], count: int = 5) -> tuple[tuple[str, float], ...]:
        module = self._arguments["base_params"]
        names = {id(p): name for name, p in module.named_parameters()} if isinstance(module, nn.Module) else {}
        squares = [float(x.double().square().sum()) for x in v]
        total = sum(squares) or math.nan
        rows = [(names.get(id(p), f"tensor {i}"), squares[i] / total) for i, p in enumerate(self._theta)]
        return tuple(sorted(rows, key=lambda row: -row[1])[:count])

    def _untouched(self, v: list[Tensor]) -> float | None:
        optimizer = self._arguments.get("optimizer")
        untouched = total = 0.0
        known = False
        for p, x in zip(self._arguments.get("master_params") or self._theta, v, strict=True):
            total += float(x.double().square().sum())
            state = optimizer.state.get(p, {}) if optimizer is not None else {}
            names = ("exp_avg",) if "exp_inf" in state else _SECOND_MOMENTS  # Adamax' maximum is eps there, not 0
            for moment in (state.get(name) for name in names):
                if isinstance(moment, Tensor) and moment.shape == x.shape:
                    known = True
                    untouched += float(x.double().square()[moment == 0].sum())
        return untouched / total if known and total else None


def _is_adam(optimizer: Any) -> TypeGuard[torch.optim.Optimizer]:
    """Whether its first update is a sign: those with a running mean of the gradient over the root of that of g^2."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return False
    return any("exp_avg" in state and "exp_avg_sq" in state for state in optimizer.state.values())


def _not_finite(forward: MetaGradient, gradient: Tensor, reference: Tensor | None) -> str:
    """What of the base loss at theta is NaN or infinite, in words."""
    if not forward.base_loss_minus.isfinite():
        return f"base_loss is {float(forward.base_loss_minus)} at theta"
    if not gradient.isfinite().all():
        return "dL_base/dlambda at theta holds NaN or infinity"
    if reference is not None and not reference.isfinite().all():
        return "the derivative of dL_base/dlambda along v holds NaN or infinity"
    return ""


def _flat(grads: Sequence[Tensor | None], like: Sequence[Tensor] = ()) -> Tensor:
    """All entries as one float64 vector on the CPU; None counts as zeros."""
    rows = [torch.zeros_like(like[i]) if g is None else g for i, g in enumerate(grads)]
    return torch.cat([row.detach().double().cpu().flatten() for row in rows])


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))
