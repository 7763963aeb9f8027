"""The biased-regression program: closed forms against autograd and finite differences, and the program to its end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import relative_error
from torch import Tensor

from sama_experiments import biased_regression
from sama_experiments.biased_regression.problem import ALGORITHMS, BiasedRegression, Run, run
from sama_experiments.biased_regression.program import rows_of, verdict
from sama_kernels.algorithms import ConjugateGradient, Neumann, Nystrom, SamaNA


def problem_of(seed: int, beta: float) -> tuple[BiasedRegression, Tensor]:
    problem = BiasedRegression.random(seed, beta, samples=23, features=9)
    lam = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 100))
    return problem, lam


CASES = pytest.mark.parametrize(("seed", "beta"), [(0, 0.1), (1, 0.1), (2, 1.0), (3, 7.0)])


@CASES
def test_solution_and_jacobian_are_those_of_the_base_loss(seed: int, beta: float) -> None:
    problem, lam = problem_of(seed, beta)
    w = problem.solution(lam).requires_grad_()
    (g,) = torch.autograd.grad(problem.base_loss(w, lam), w)
    assert g.norm() < 1e-13
    anywhere = torch.randn_like(w)
    hessian = torch.autograd.functional.hessian(lambda v: problem.base_loss(v, lam), anywhere)
    assert relative_error(problem.jacobian, hessian) < 1e-13


@CASES
def test_hypergradient_is_that_of_autograd_and_of_finite_differences(seed: int, beta: float) -> None:
    """Autograd through gradient descent that has converged, which knows nothing of H^-1; and central differences, which
    are exact for a quadratic up to rounding."""
    problem, lam = problem_of(seed, beta)
    leaf = lam.clone().requires_grad_()
    w = torch.zeros_like(leaf)
    step = 1 / torch.linalg.eigvalsh(problem.jacobian)[-1]
    for _ in range(1500):
        w = w - step * (problem.x.T @ (problem.x @ w - problem.y) + beta * (w - leaf))
    (through_descent,) = torch.autograd.grad(problem.meta_loss(w), leaf)
    exact = problem.hypergradient(lam)
    assert relative_error(exact, through_descent) < 1e-11

    def meta(shifted: Tensor) -> Tensor:
        return problem.meta_loss(problem.solution(shifted))

    unit = 0.1 * torch.eye(len(lam), dtype=lam.dtype)
    differences = torch.stack([(meta(lam + e) - meta(lam - e)) / 0.2 for e in unit])
    assert relative_error(exact, differences) < 1e-10


@CASES
def test_optimum(seed: int, beta: float) -> None:
    """The gradient vanishes there, the meta loss is lower than around, and Newton's step from anywhere leads there."""
    problem, lam = problem_of(seed, beta)
    best = problem.optimum()
    assert problem.hypergradient(best).norm() < 1e-12 * problem.hypergradient(lam).norm() + 1e-13
    least = problem.meta_loss(problem.solution(best))
    around = best + torch.randn(20, len(best), dtype=torch.float64)
    assert all(problem.meta_loss(problem.solution(x)) > least for x in around)
    curvature = torch.autograd.functional.hessian(lambda x: problem.meta_loss(problem.solution(x)), lam)
    assert relative_error(lam - torch.linalg.solve(curvature, problem.hypergradient(lam)), best) < 1e-8
    eigenvalues = torch.linalg.eigvalsh(curvature)
    assert problem.conditions()["exact"] == pytest.approx((eigenvalues[-1] / eigenvalues[0]).item(), rel=1e-8)


@CASES
def test_meta_gradients_of_the_library(seed: int, beta: float) -> None:
    problem, lam = problem_of(seed, beta)
    lam.requires_grad_()
    exact = problem.hypergradient(lam.detach())
    d = torch.autograd.functional.jacobian(problem.meta_loss, problem.solution(lam.detach()))
    assert relative_error(problem.meta_gradient(SamaNA(), lam), beta * d) < 1e-12
    largest = torch.linalg.eigvalsh(problem.jacobian)[-1].item()
    for algorithm in (ConjugateGradient(iterations=30), Neumann(terms=2000, step_size=1 / largest)):
        found = problem.meta_gradient(algorithm, lam)
        assert abs(torch.cosine_similarity(found, exact, dim=0) - 1) < 1e-9
        assert relative_error(found, exact) < 1e-9
    few = problem.meta_gradient(ConjugateGradient(iterations=2), lam)
    assert 1e-9 < 1 - torch.cosine_similarity(few, exact, dim=0) < 0.5


def test_nystroem_draws_new_columns_each_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """With lambda held still, cosines differ from update to update only by the columns."""
    monkeypatch.setitem(ALGORITHMS, "Nystroem", lambda problem: Nystrom(rank=3, damping=problem.beta))
    problem = BiasedRegression.random(0, 0.1)
    cosines = run("Nystroem", problem, 0, 4, meta_lr=1e-12).cosines
    assert len({round(x, 6) for x in cosines}) == 4
    # not to the last bit: a sum's order follows where its memory begins
    assert cosines == pytest.approx(run("Nystroem", problem, 0, 4, meta_lr=1e-12).cosines, rel=1e-9)


def test_verdict_follows_the_figures() -> None:
    def rows(cosine: float, distances: list[float]) -> str:
        sama, cg = Run("SAMA", 0.1, 0, [cosine] * 4, distances), Run("CG", 0.1, 0, [1.0] * 4, [4.0, 3.0, 2.0, 1.0, 0.5])
        return verdict(rows_of([sama, cg]), 0.1)

    good = rows(0.95, [4.0, 3.0, 2.0, 1.0, 0.5])
    assert "NOT" not in good and "mean cosine 0.950" in good and "half of the way after 2 updates (CG 2)" in good
    assert "alignment NOT confirmed" in rows(0.85, [4.0, 3.0, 2.0, 1.0, 0.5])
    assert "speed NOT confirmed" in rows(0.95, [4.0, 3.0, 3.0, 3.0, 2.5])  # never half of the way
    assert "speed NOT confirmed" in rows(0.95, [4.0, 1.0, 3.0, 1.0, 0.5])  # not stable
    assert "speed NOT confirmed" in rows(0.95, [4.0, 3.5, 3.0, 2.5, 2.0])  # after 4 updates, twice CG's 2


def test_whole_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert biased_regression.main(["--updates", "3", "--seeds", "0", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "biased_regression.json").read_text())
    assert (tmp_path / "biased_regression.png").read_bytes().startswith(b"\x89PNG")
    assert [(row["beta"], row["algorithm"]) for row in result["table"]] == [
        (b, a) for b in (0.1, 1) for a in ALGORITHMS
    ]
    for row, curves in zip(result["table"], result["curves"], strict=True):
        assert len(curves["cosines_mean"]) == 3 and len(curves["distances_mean"]) == 4
        assert row["last_distance"] < row["first_distance"] and row["cosine"] > 0.5
        assert row["algorithm"] != "exact" or row["smallest_cosine"] == pytest.approx(1, abs=1e-12)
    low, high = result["median_conditions"]
    assert low["base_jacobian"] > high["base_jacobian"] > 1 and low["exact"] > low["sama"]
    assert result["options"]["updates"] == 3
    printed = capsys.readouterr().out
    assert "beta = 0.1: high directional alignment" in printed and "Nystroem" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--updates", "0"], "--updates"),
        (["--beta", "-1"], "must be above 0 and finite"),
        (["--beta", "inf"], "must be above 0 and finite"),
        (["--seeds", "x"], "--seeds"),
        (["--samples", "19"], "--samples 19: fewer than the 20 features"),
        (["--out", "/dev/null/x"], "--out /dev/null/x"),
    ],
)
def test_bad_options_end_with_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program = [sys.executable, "-m", "sama_experiments.biased_regression", "--updates", "1", *arguments]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
