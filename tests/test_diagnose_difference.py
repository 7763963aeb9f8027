"""`diagnose` judges the difference that it is asked about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import after_steps, weight_net
from test_diagnose import diagnose, text_and_json_agree

import sama_kernels as sk


@pytest.mark.parametrize("seed", range(3))
def test_forward_is_of_first_order(seed: int) -> None:
    """At an alpha where the central difference is accurate and the forward one is not; then where both are."""
    problem = weight_net(seed)
    found = diagnose(problem, alpha=0.2, difference="forward")
    assert found.error < 0.05 < found.error_forward, str(found)
    assert found.verdict == "alpha too large" and 'difference="central"' in found.cure
    assert "the forward difference" in found.words and found.difference == "forward"
    text_and_json_agree(found)
    exact, forward = (
        sk.meta_grad(
            problem.base_loss, problem.meta_loss, base_params=problem.net, meta_params=problem.weigher,
            optimizer=None, adaptation="none", alpha=0.2, difference=difference,
        ).grads
        for difference in ("exact", "forward")
    )  # fmt: skip
    a, b = (torch.cat([g.flatten() for g in grads]) for grads in (forward, exact))
    assert found.error_forward == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-6)
    assert diagnose(problem, alpha=0.2).verdict == "fine"
    accurate = diagnose(problem, alpha=0.01, difference="forward")
    assert accurate.verdict == "fine" and accurate.words.startswith("the forward difference is off by")


def test_a_forward_difference_far_too_long_is_judged_as_the_central_one_is() -> None:
    problem = weight_net(1)
    found = diagnose(problem, alpha=100.0, difference="forward")
    assert found.verdict == "alpha too large" and found.suggested_alpha is not None
    assert found.cure.startswith('difference="central" with alpha=')
    assert diagnose(problem, alpha=found.suggested_alpha).verdict == "fine"


@pytest.mark.parametrize("alpha", [1e-16, 0.1, 100.0])
def test_alpha_does_not_matter_to_exact(alpha: float) -> None:
    found = diagnose(weight_net(3), alpha=alpha, difference="exact")
    assert found.verdict == "fine" and "takes no step" in found.words and found.reference == "forward mode"
    text_and_json_agree(found)


def test_other_faults_concern_exact_too() -> None:
    problem = weight_net(2)
    original = problem.meta_loss
    problem.meta_loss = lambda: 0 * original()
    found = diagnose(problem, after_steps(problem, 2), alpha=0.3, difference="exact")
    assert found.verdict == "degenerate"
    assert "alpha 0" not in str(found) and "no step; ||theta||" in str(found)


def test_an_unknown_difference() -> None:
    wrong: Any = "backward"
    with pytest.raises(ValueError, match="difference"):
        diagnose(weight_net(2), alpha=0.3, difference=wrong)
