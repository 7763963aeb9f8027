"""Optimizers that divide by the root of a second moment: NAdam, RAdam, Adagrad, RMSprop (`ops.adapt_norm_moments`)."""

from __future__ import annotations

import torch

from sama_kernels import ops
from sama_kernels.adaptation.moments import call, gathered, rows, tail
from sama_kernels.adaptation.plan import GroupStep, OpCall
from sama_kernels.adaptation.step_record import SKIPPED


def nadam(step: GroupStep) -> list[OpCall]:
    """u = lr [(1 - mu_t) g / (1 - P) + mu_{t+1} m / (1 - P mu_{t+1})] / q with mu_t = beta1 (1 - 0.96^(t psi) / 2) and
    P = mu_1 ... mu_t, q = sqrt(w / (1 - beta2^t)) + eps (Dozat, "Incorporating Nesterov momentum into Adam", 2016).
    """
    h = step.hyper
    used, states = step.with_state("exp_avg")
    if not used:
        return []
    lr, (t, product), place = gathered(step, states, "step", "mu_product")
    beta1, beta2 = map(float, h["betas"])
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (k * h["momentum_decay"])) for k in (t, t + 1))
    a, b = (1 - mu) / (1 - product), mu_next / (1 - product * mu_next)
    coefficients = rows(
        step, len(used), place, rate=lr, a=a, b=b, slope=a + b * (1 - beta1), kappa=(1 - beta2**t) ** -0.5,
        omega=1 - beta2, eps=float(h["eps"]), tail=tail(step),
    )  # fmt: skip
    return [call(step, used, coefficients, "exp_avg_sq", "exp_avg", decay=step.coupled_decay())]


def radam(step: GroupStep) -> list[OpCall]:
    """u = lr rho sqrt(c2) / c1 m / (sqrt(w) + eps), and lr m / c1 as long as the variance is intractable, with
    c = 1 - beta^t and the rectification rho (Liu et al., "On the variance of the adaptive learning rate", 2020).

    Which of the two a step was is decided on the device if the counters are there.
    """
    h = step.hyper
    used, states = step.with_state("exp_avg")
    if not used:
        return []
    lr, (t,), place = gathered(step, states, "step")
    beta1, beta2 = map(float, h["betas"])
    c1, c2 = 1 - beta1**t, 1 - beta2**t
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / c2
    rectified = length > 5
    rho = ((length - 4) * (length - 2) * longest / (length * ((longest - 4) * (longest - 2)))).sqrt()
    coefficients = rows(
        step, len(used), place, rate=torch.where(rectified, lr / c1 * rho * c2.sqrt(), lr / c1), b=1.0,
        slope=1 - beta1, kappa=rectified.double(), omega=1 - beta2, eps=torch.where(rectified, float(h["eps"]), 1.0),
        tail=torch.where(rectified, tail(step), 1.0),
    )  # fmt: skip
    return [call(step, used, coefficients, "exp_avg_sq", "exp_avg", decay=step.coupled_decay())]


def adagrad(step: GroupStep) -> list[OpCall]:
    """u = lr / (1 + (t - 1) lr_decay) g / (sqrt(sum) + eps), where sum contains g^2 (Duchi et al., 2011)."""
    h = step.hyper
    used, states = step.with_state("sum")
    if SKIPPED not in h:  # Adagrad has its state before the first step
        used = [i for i, state in zip(used, states, strict=True) if state["step"] > 0]
        states = [step.optimizer.state[step.params[i]] for i in used]  # one look, before any step was seen
    if not used:
        return []
    lr, (t,), place = gathered(step, states, "step")
    coefficients = rows(
        step, len(used), place, rate=lr / (1 + (t - 1) * h["lr_decay"]), a=1.0, slope=1.0, kappa=1.0, omega=1.0,
        eps=float(h["eps"]), tail=tail(step),
    )  # fmt: skip
    return [call(step, used, coefficients, "sum", decay=step.coupled_decay())]


def rmsprop(step: GroupStep) -> list[OpCall]:
    """u = lr g / (sqrt(w) + eps), centered: w - mean^2 in place of w (Graves, "Generating sequences", 2013).

    With momentum u = lr buffer, where the buffer has g / (sqrt(w) + eps) as its latest addend: the same D.
    """
    h = step.hyper
    used, states = step.with_state("square_avg")
    if not used:
        return []
    lr, _, place = gathered(step, states)
    coefficients = rows(
        step, len(used), place, rate=lr, a=1.0, slope=1.0, kappa=1.0, omega=1 - float(h["alpha"]), eps=float(h["eps"]),
        tail=tail(step),
    )  # fmt: skip
    mean, form = ("grad_avg", ops.CENTERED) if h["centered"] else ("", ops.RATIO)
    buffer = "momentum_buffer" if h["momentum"] > 0 else ""
    return [call(step, used, coefficients, "square_avg", mean, buffer, form=form, decay=step.coupled_decay())]
