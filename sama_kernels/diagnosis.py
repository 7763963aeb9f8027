"""What `diagnose` returns: the figures of one batch, and the verdict that follows from them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

TOLERANCE = 0.05
"""Relative error up to which a meta gradient is fine: minibatches differ by far more."""

TOLERANCE_16_BIT = 0.3
"""The same where base or meta parameters have 16 bits: there the reference is itself only good to some percent."""

ACCURATE = 0.01
"""The suggested alpha is the largest one of the ladder with at most this error, if there is one."""

REALISED = 0.9
"""Share of a 16-bit step, and its cosine with v, below which rounding is at fault."""

UNTOUCHED = 0.5
"""Share of ||v||^2 in cells that the optimizer never moved above which they make the meta gradient."""

STABLE = 0.02
"""Two neighbouring rungs that differ by less agree with each other."""


SMALL = 0.01
"""Steps up to this fraction of ||theta|| are small."""


@dataclass(frozen=True)
class Rung:
    """The central difference at one alpha.

    Attributes:
        alpha: length of the step.
        error: ||difference - reference|| / ||reference||; None if there is no reference.
        change: the same between this rung and the next smaller one, relative to that; None for the smallest.
    """

    alpha: float
    error: float | None
    change: float | None


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found on one batch; `print` it, or take `to_dict()`. All figures are plain Python numbers.

    Attributes:
        verdict: "fine", "alpha too large", "alpha too small", "precision", "degenerate", "plain detach" or "untouched
            cells".
        words: what is the matter. cure: what to do about it.
        suggested_alpha: an absolute alpha that is accurate on this batch; None if alpha is not the matter.
        alpha: length of the step, ||epsilon v||; 0 if degenerate.
        difference: the one that was asked for, which the verdict is about: "central", "forward" or "exact".
        theta_norm, norm, epsilon: ||theta||, ||v|| and alpha / ||v||.
        error, error_forward: relative error of the central and the forward difference at alpha, against the reference.
        reference: "forward mode", "double backward", or "extrapolation" of central differences where neither is
            possible; "none" if these do not agree with each other at any alpha either.
        why_not: the reasons, by reference that was not possible.
        ladder: central differences at smaller and larger alpha, in ascending order.
        base_loss, change_plus, change_minus: L_base(theta), and L_base(theta+-) - L_base(theta) at alpha.
        agreeing_digits: decimal digits to which the lambda gradients at theta+ and theta- agree, all of which the
            difference loses; of_digits: how many the dtype of lambda has.
        realised, alignment: see `MetaGradient`; None if no base parameter has 16 bits.
        largest: the tensors with the most of ||v||^2 and their shares.
        untouched: share of ||v||^2 in cells whose second moment is 0; None if the optimizer keeps none.
        detached: whether base_loss was seen to use a plainly detached value of theta together with lambda.
    """

    verdict: str = ""
    words: str = ""
    cure: str = ""
    suggested_alpha: float | None = None
    alpha: float = 0.0
    difference: str = "central"
    theta_norm: float = math.nan
    norm: float = math.nan
    epsilon: float = 0.0
    error: float | None = None
    error_forward: float | None = None
    reference: str = "none"
    why_not: dict[str, str] = field(default_factory=dict)
    ladder: tuple[Rung, ...] = ()
    base_loss: float = math.nan
    change_plus: float = math.nan
    change_minus: float = math.nan
    agreeing_digits: float | None = None
    of_digits: float | None = None
    realised: float | None = None
    alignment: float | None = None
    largest: tuple[tuple[str, float], ...] = ()
    untouched: float | None = None
    detached: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data; numbers that are not finite become None."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        return plain

    def __str__(self) -> str:
        lines = [f"{self.verdict}: {self.words}"]
        if self.cure:
            lines.append(f"  cure: {self.cure}")
        relative = self.alpha / self.theta_norm if self.theta_norm else math.nan
        alpha = f"alpha {self.alpha:.3g} = {relative:.2g} of" if self.alpha else "no step;"  # degenerate
        lines.append(f"  {alpha} ||theta|| {self.theta_norm:.4g}; ||v|| {self.norm:.3g}, epsilon {self.epsilon:.3g}")
        if self.ladder:
            lines += self._measured()
        if self.largest:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in self.largest)
            lines.append(f"  ||v||^2 is in: {shares}")
        if self.untouched is not None:
            lines.append(f"  ||v||^2 in cells that the optimizer never moved: {self.untouched:.2%}")
        return "\n".join(lines)

    def _measured(self) -> list[str]:
        lines = [f"  reference: {self.reference}"]
        lines += [f"    not {name}: {reason}" for name, reason in self.why_not.items()]
        lines.append(
            f"  error: central {_percent(self.error)}, forward {_percent(self.error_forward)};"
            f" loss {self.base_loss:.6g}, at theta+ {self.change_plus:+.3g}, at theta- {self.change_minus:+.3g}"
        )
        lines += [
            f"    alpha {rung.alpha:<9.3g} error {_percent(rung.error):>8}   change {_percent(rung.change):>8}"
            for rung in self.ladder
        ]
        if self.agreeing_digits is not None and self.of_digits is not None:
            lines.append(
                f"  the two lambda gradients agree to {self.agreeing_digits:.1f} of {self.of_digits:.1f} digits"
            )
        if self.realised is not None and self.alignment is not None:
            lines.append(f"  realised {self.realised:.3f} of the step, cosine {self.alignment:.3f}")
        return lines


def best(ladder: tuple[Rung, ...]) -> Rung:
    """The rung with the least error."""
    return min(ladder, key=lambda rung: known_error(rung.error))


def known_error(value: float | None) -> float:
    """An error that may be unknown, as a number to compare."""
    return math.inf if value is None or math.isnan(value) else value


def is_stable(ladder: tuple[Rung, ...], theta_norm: float) -> bool:
    """Whether there are neighbouring rungs at small steps that agree with each other.

    Far from theta they may agree with each other too: the losses of many networks grow like a power there.
    """
    small = (rung for rung in ladder if rung.alpha <= SMALL * theta_norm)
    return any(rung.change is not None and rung.change <= STABLE for rung in small)


def degenerate(facts: Diagnosis, words: str, cure: str) -> Diagnosis:
    """`facts` of a meta step that has no direction."""
    return dataclasses.replace(facts, verdict="degenerate", words=words, cure=cure)


def judge(facts: Diagnosis, *, sixteen_bit: bool) -> Diagnosis:
    """`facts` with the verdict that follows from them.

    Arguments:
        sixteen_bit: whether a base or meta parameter is bfloat16 or float16.
    """
    return dataclasses.replace(facts, **_verdict(facts, TOLERANCE_16_BIT if sixteen_bit else TOLERANCE))


def _verdict(facts: Diagnosis, tolerance: float) -> dict[str, Any]:
    if facts.untouched is not None and facts.untouched > UNTOUCHED:
        return {
            "verdict": "untouched cells",
            "words": f"{facts.untouched:.1%} of ||v||^2 is in cells that never had a gradient, so the meta gradient is"
            " that of a move which the optimizer never makes",
            "cure": 'adaptation="paper", where they count for nothing',
        }
    if facts.difference == "exact" and facts.reference == "forward mode":
        words = f'"exact" takes no step; the central difference at this alpha is off by {_percent(facts.error)}'
        return {"verdict": "fine", "words": words, "cure": ""}
    at_best, error = best(facts.ladder), known_error(facts.error)
    genuine = facts.reference in ("forward mode", "double backward")
    in_agreement = facts.detached or is_stable(facts.ladder, facts.theta_norm)
    disagrees = genuine and known_error(at_best.error) > tolerance and in_agreement
    if disagrees or (facts.detached and not genuine):
        return _plain_detach(facts, at_best)
    if facts.realised is not None and facts.alignment is not None and min(facts.realised, facts.alignment) < REALISED:
        return _lost_in_rounding(facts, tolerance)
    name, asked = ("forward", facts.error_forward) if facts.difference == "forward" else ("central", facts.error)
    if known_error(asked) <= tolerance:
        return {"verdict": "fine", "words": f"the {name} difference is off by {_percent(asked)}", "cure": ""}
    if error <= tolerance:
        return _of_first_order(facts)
    if known_error(at_best.error) > tolerance or at_best.alpha == facts.alpha:
        return _precision(facts, at_best)
    suggestion = _suggestion(facts.ladder)
    central = 'difference="central" with ' if name == "forward" else ""  # whose ladder it is
    cure = f"{central}alpha={suggestion:.2g}, or alpha=sama_kernels.relative({suggestion / facts.theta_norm:.2g})"
    if at_best.alpha < facts.alpha:
        words = f"the difference quotient is off by {_percent(asked)}: theta+ and theta- are too far apart"
        return {"verdict": "alpha too large", "words": words, "cure": cure, "suggested_alpha": suggestion}
    words = f"the difference quotient is off by {_percent(asked)}, which is rounding: theta+ and theta- are too close"
    return {"verdict": "alpha too small", "words": words, "cure": cure, "suggested_alpha": suggestion}


def _of_first_order(facts: Diagnosis) -> dict[str, Any]:
    words = f"the forward difference, of first order in alpha, is off by {_percent(facts.error_forward)}"
    cure = f'difference="central", which is off by {_percent(facts.error)} at this alpha; or a smaller alpha'
    return {"verdict": "alpha too large", "words": words, "cure": cure}


def _plain_detach(facts: Diagnosis, at_best: Rung) -> dict[str, Any]:
    seen = (
        "base_loss uses a value that depends on theta but was detached plainly"
        if facts.detached
        else "base_loss uses something that moves with theta and that its gradient does not see (.item(), numpy, a"
        " custom backward)"
    )
    amount = (
        f"; the error stays at {_percent(at_best.error)} however small alpha is" if at_best.error is not None else ""
    )
    cure = "write sama_kernels.stop_gradient(x) for x.detach()"
    if facts.reference == "forward mode":
        cure += ', or use difference="exact"'
    return {"verdict": "plain detach", "words": seen + amount, "cure": cure}


def _lost_in_rounding(facts: Diagnosis, tolerance: float) -> dict[str, Any]:
    at_best = best(facts.ladder)
    cosine = "(nothing moves)" if math.isnan(facts.alignment or 0) else f"(its cosine with v: {facts.alignment:.2f})"
    larger = at_best.alpha if at_best.alpha > facts.alpha and known_error(at_best.error) <= tolerance else None
    return {
        "verdict": "alpha too small",
        "words": f"rounding to 16 bits realises {facts.realised:.2f} of the step {cosine}",
        "cure": f"a larger alpha{'' if larger is None else f' ({larger:.2g})'} or float32 parameters;"
        ' difference="exact"; rounding="stochastic" mends the first of the two',
        "suggested_alpha": larger,
    }


def _precision(facts: Diagnosis, at_best: Rung) -> dict[str, Any]:
    instead = 'difference="exact", or ' if facts.reference == "forward mode" else ""
    return {
        "verdict": "precision",
        "words": f"no alpha makes the difference quotient accurate: {_percent(at_best.error)} off at its best, at alpha"
        f" {at_best.alpha:.2g}",
        "cure": f"{instead}float32 (float64) parameters and losses in place of 16 (32) bits",
        "suggested_alpha": at_best.alpha if at_best.error is not None else None,
    }


def _suggestion(ladder: tuple[Rung, ...]) -> float:
    accurate = [rung.alpha for rung in ladder if known_error(rung.error) <= ACCURATE]
    return max(accurate) if accurate else best(ladder).alpha


def _percent(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.0f} %"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
