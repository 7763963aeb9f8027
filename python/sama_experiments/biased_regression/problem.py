"""The bilevel problem of Appendix E, "biased regression", with its closed forms, and a run of an algorithm on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import sama_kernels as sk
from sama_kernels.algorithms import Algorithm, ConjugateGradient, Neumann, Nystrom, SamaNA

# The paper gives no sizes. With twice as many samples as features the Jacobian is far from the identity (condition 14
# at beta = 0.1, 3.4 at 1), and lambda* can still be reached: with 20 samples (condition 36) it is twice as far, and the
# exact gradient goes 14 % of the way in 100 updates.
SAMPLES, FEATURES, NOISE = 40, 20, 0.1


@dataclass(frozen=True)
class BiasedRegression:
    """min over lambda of L_meta(w*(lambda)), with w*(lambda) = argmin over w of L_base(w, lambda), in float64:

    L_base = (|X w - y|^2 + beta |w - lambda|^2) / 2,    L_meta = |X' w - y'|^2 / 2.

    The factors 1/2, which the paper leaves out, make its closed forms the gradients to the letter. X, X': (samples,
    features), of full column rank; y, y': (samples,).
    """

    x: Tensor
    y: Tensor
    x_meta: Tensor
    y_meta: Tensor
    beta: float

    @classmethod
    def random(cls, seed: int, beta: float, samples: int = SAMPLES, features: int = FEATURES) -> BiasedRegression:
        """Standard normal features and one true w for both levels. Losses are means over the samples, as in training:
        X and y hold a factor 1 / sqrt(samples)."""
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        w, scale = normal(features), samples**-0.5
        x, x_meta = (scale * normal(samples, features) for _ in range(2))
        y, y_meta = (a @ w + scale * NOISE * normal(samples) for a in (x, x_meta))
        return cls(x, y, x_meta, y_meta, beta)

    def base_loss(self, w: Tensor, lam: Tensor) -> Tensor:
        return ((self.x @ w - self.y).square().sum() + self.beta * (w - lam).square().sum()) / 2

    def meta_loss(self, w: Tensor) -> Tensor:
        return (self.x_meta @ w - self.y_meta).square().sum() / 2

    @cached_property
    def jacobian(self) -> Tensor:
        """H = d^2 L_base / dw^2 = X^T X + beta I."""
        return self.x.T @ self.x + self.beta * torch.eye(self.x.shape[1], dtype=self.x.dtype)

    def solution(self, lam: Tensor) -> Tensor:
        """dL_base/dw = H w - X^T y - beta lambda = 0, so w* = H^-1 (X^T y + beta lambda)."""
        w: Tensor = torch.linalg.solve(self.jacobian, self.x.T @ self.y + self.beta * lam)
        return w

    def hypergradient(self, lam: Tensor) -> Tensor:
        """dw*/dlambda = beta H^-1, so g = beta H^-1 d with d = dL_meta/dw at w* = X'^T (X' w* - y')."""
        d = self.x_meta.T @ (self.x_meta @ self.solution(lam) - self.y_meta)
        inverted: Tensor = torch.linalg.solve(self.jacobian, d)
        return self.beta * inverted

    def optimum(self) -> Tensor:
        """X' w* - y' = A lambda - b is linear in lambda, with A = beta X' H^-1 and b = y' - X' H^-1 X^T y. So lambda*
        solves least squares: (A^T A)^-1 A^T b, here without squaring the condition of A.

        It is also where d = 0, as H is invertible: whatever invertible matrix an algorithm takes for H^-1, its meta
        gradient vanishes at lambda* and nowhere else.
        """
        a = self.beta * torch.linalg.solve(self.jacobian, self.x_meta.T).T
        b = self.y_meta - self.x_meta @ self.solution(torch.zeros_like(self.x[0]))
        lam: Tensor = torch.linalg.lstsq(a, b[:, None], driver="gelsd").solution[:, 0]  # gelsy: pytorch #187411
        return lam

    def conditions(self) -> dict[str, float]:
        """Ratio of the largest to the smallest eigenvalue of H, and of dg/dlambda, with which a gradient descent
        converges: beta^2 H^-1 X'^T X' H^-1 for the exact g, beta^2 X'^T X' H^-1 for SAMA's."""
        inverse, gram = torch.linalg.inv(self.jacobian), self.x_meta.T @ self.x_meta
        matrices = {"base_jacobian": self.jacobian, "exact": inverse @ gram @ inverse, "sama": gram @ inverse}
        eigenvalues = {name: torch.linalg.eigvals(matrix).real for name, matrix in matrices.items()}
        return {name: (values.max() / values.min()).item() for name, values in eigenvalues.items()}

    def meta_gradient(self, algorithm: Algorithm, lam: Tensor) -> Tensor:
        """The meta gradient of an algorithm at w*(lambda); lam requires grad."""
        w = self.solution(lam.detach()).requires_grad_()
        out = sk.meta_grad(
            lambda: self.base_loss(w, lam), lambda: self.meta_loss(w), base_params=[w], meta_params=[lam],
            optimizer=None, adaptation="none", algorithm=algorithm,
        )  # fmt: skip
        return out.grads[0]


def _neumann(problem: BiasedRegression) -> Algorithm:
    return Neumann(terms=5, step_size=1 / torch.linalg.eigvalsh(problem.jacobian)[-1].item())


# Five Hessian-vector products each, SAMA none. Damping beta: H has no smaller eigenvalue; the mean cosine with the
# library's 0.01 is lower (0.79 against 0.80 at beta = 0.1, 0.85 against 0.92 at 1).
ALGORITHMS: dict[str, Callable[[BiasedRegression], Algorithm] | None] = {
    "SAMA": lambda problem: SamaNA(),
    "CG": lambda problem: ConjugateGradient(iterations=5),
    "Neumann": _neumann,
    "Nystroem": lambda problem: Nystrom(rank=5, damping=problem.beta),
    "exact": None,
}


@dataclass(frozen=True)
class Run:
    """One algorithm on one problem: the cosine before each update, the distance before each and after the last."""

    algorithm: str
    beta: float
    seed: int
    cosines: list[float]
    distances: list[float]

    @property
    def half_way(self) -> int | None:
        """Updates until the distance to lambda* is half of what it was."""
        return next((t for t, x in enumerate(self.distances) if x <= self.distances[0] / 2), None)

    @property
    def rise(self) -> float:
        """The largest rise of the distance over its smallest value before, as a fraction of the first."""
        least = [min(self.distances[: t + 1]) for t in range(len(self.distances))]
        return max(x - low for x, low in zip(self.distances, least, strict=True)) / self.distances[0]


def run(name: str, problem: BiasedRegression, seed: int, updates: int, meta_lr: float) -> Run:
    """So many meta updates with the algorithm of this name, from lambda = 0."""
    optimum, make = problem.optimum(), ALGORITHMS[name]
    lam = torch.zeros_like(optimum, requires_grad=True)
    optimizer = torch.optim.Adam([lam], lr=meta_lr)
    cosines, distances = [], [optimum.norm().item()]
    torch.manual_seed(seed)
    for _ in range(updates):
        torch.rand(())  # meta_grad puts the generator back: without this Nystroem would draw the same columns always
        exact = problem.hypergradient(lam.detach())
        lam.grad = exact.clone() if make is None else problem.meta_gradient(make(problem), lam)
        cosines.append(torch.cosine_similarity(exact, lam.grad, dim=0).item())
        optimizer.step()
        distances.append((lam.detach() - optimum).norm().item())
    return Run(name, problem.beta, seed, cosines, distances)
