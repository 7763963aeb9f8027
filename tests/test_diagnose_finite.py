"""`diagnose` on losses that are not finite, and its words about optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import Plain
from torch import Tensor, nn

import sama_kernels as sk


def diagnosis(problem: Plain, optimizer: Any, base_loss: Any = None, **options: Any) -> Any:
    return sk.diagnose(
        base_loss or problem.base_loss, problem.meta_loss, base_params=problem.net, meta_params=[problem.lam],
        optimizer=optimizer, **{"alpha": 0.01, **options},
    )  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_loss_that_is_not_finite(value: float) -> None:
    problem = Plain()
    optimizer, _ = problem.trained((torch.optim.Adam, {"lr": 0.01}))
    found = diagnosis(problem, optimizer, lambda: problem.base_loss() * value)
    assert found.verdict == "degenerate" and found.words.startswith(f"base_loss is {value}")


def test_a_gradient_of_lambda_that_is_not_finite() -> None:
    """sqrt has none at 0, where one weight is; the loss is finite."""
    problem = Plain()
    optimizer, _ = problem.trained((torch.optim.Adam, {"lr": 0.01}))
    with torch.no_grad():
        problem.lam.abs_()[3] = 0.0

    def base_loss() -> Tensor:
        return (problem.lam.sqrt()[:, None] * (problem.net(problem.x) - problem.y).square()).mean()

    found = diagnosis(problem, optimizer, base_loss)
    assert found.verdict == "degenerate" and "dL_base/dlambda at theta holds NaN or infinity" in found.words


def test_the_first_step_is_a_sign_for_adam_alone() -> None:
    problem = Plain()
    for kind, options, words in (
        (torch.optim.SGD, {"lr": 0.1}, "the meta loss has no gradient where the optimizer moves theta"),
        (torch.optim.Adam, {"lr": 0.1, "eps": 0.0}, "D is zero by nature"),
    ):
        optimizer = kind(problem.theta, **options)
        optimizer.zero_grad()
        problem.base_loss().backward()
        optimizer.step()
        problem.meta_loss = lambda: (problem.net(problem.x_meta) * 0).sum()  # type: ignore[method-assign]
        found = diagnosis(problem, optimizer)
        assert found.verdict == "degenerate" and words in found.words


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adamax, torch.optim.RMSprop, torch.optim.Adagrad])
def test_rows_that_no_gradient_ever_reached(kind: Any) -> None:
    """A meta loss of words that the base steps' batches did not have."""
    embedding, lam = nn.Embedding(6, 3).double(), torch.randn(4, dtype=torch.float64, requires_grad=True)
    optimizer = kind(embedding.parameters(), lr=0.01)
    seen, unseen = torch.tensor([0, 1, 2, 0]), torch.tensor([4, 5])

    def base_loss() -> Tensor:
        return (lam.sigmoid() * embedding(seen).square().sum(1)).mean()

    for _ in range(2):
        optimizer.zero_grad()
        base_loss().backward()
        optimizer.step()

    def decayed() -> Tensor:
        return base_loss() + lam.sum() * embedding.weight.square().mean()

    for adaptation, verdict in (("exact", "untouched cells"), ("paper", "degenerate")):
        found = sk.diagnose(
            decayed, lambda: embedding(unseen).square().mean(), base_params=embedding, meta_params=[lam],
            optimizer=optimizer, adaptation=adaptation, alpha=0.01,
        )  # fmt: skip
        assert found.verdict == verdict, found
