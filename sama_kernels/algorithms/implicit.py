"""w of the implicit algorithms: what they put for H^-1 d. The formulas and their sources: `options`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sama_kernels.algorithms.hessian import BaseGradient, Vector, axpy, dot
from sama_kernels.algorithms.options import (
    T1T2,
    Algorithm,
    ConjugateGradient,
    Implicit,
    Neumann,
    Nystrom,
    Truncated,
)

Adapt = Callable[[Vector], Vector]
"""w -> D w, in new memory."""


def solve(algorithm: Algorithm, g: BaseGradient, d: Vector, adapt: Adapt) -> Vector:
    """w of dL_meta/dlambda = -(d^2 L_base / dlambda dtheta) w."""
    if isinstance(algorithm, Truncated):
        return truncated(algorithm, g, d, adapt)
    assert isinstance(algorithm, Implicit)
    w = _SOLVERS[type(algorithm)](algorithm, g, d)
    return adapt(w) if algorithm.adapt else w


def identity(_: T1T2, g: BaseGradient, d: Vector) -> Vector:
    """H = I."""
    return d


def neumann(options: Neumann, g: BaseGradient, d: Vector) -> Vector:
    """step_size * sum of (I - step_size H)^k d."""
    term = total = d
    for _ in range(options.terms):
        term = axpy(term, -options.step_size, g.hessian_product(term))
        total = axpy(total, 1.0, term)
    return [options.step_size * x for x in total]


def conjugate_gradient(options: ConjugateGradient, g: BaseGradient, d: Vector) -> Vector:
    """Without a look at the residual on the host: once it is 0, the steps are 0 too."""
    w = [torch.zeros_like(x) for x in d]
    residual = direction = d
    square = dot(residual, residual)
    for _ in range(options.iterations):
        product = axpy(g.hessian_product(direction), options.damping, direction)
        length = _ratio(square, dot(direction, product))
        w = axpy(w, length, direction)
        residual = axpy(residual, -length, product)
        previous, square = square, dot(residual, residual)
        direction = axpy(residual, _ratio(square, previous), direction)
    return w


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, 0.0, a / b)


def nystrom(options: Nystrom, g: BaseGradient, d: Vector) -> Vector:
    """With C = H[:, K] and r = damping: w = d / r - C (H_KK + C^T C / r)^-1 C^T d / r^2."""
    n = sum(x.numel() for x in d)
    if options.damping == 0:
        raise ValueError("algorithm: Nystrom needs damping > 0, as a low-rank matrix has no inverse")
    flat = torch.cat([x.flatten() for x in d])
    chosen = torch.randperm(n, device=flat.device)[: min(options.rank, n)]
    columns = []
    for k in range(len(chosen)):
        unit = torch.zeros_like(flat).index_fill_(0, chosen[k : k + 1], 1.0)
        product = g.hessian_product(_shaped(unit, d))
        columns.append(torch.cat([x.flatten() for x in product]))
    c = torch.stack(columns, dim=1)
    wide = c.double()  # the small system is ill-conditioned: squares of the eigenvalues of H
    inner = wide[chosen] + wide.T @ wide / options.damping
    solution = torch.linalg.lstsq(inner, (wide.T @ flat.double())[:, None]).solution[:, 0]
    w = (flat.double() / options.damping - wide @ solution / options.damping**2).to(flat.dtype)
    return _shaped(w, d)


def _shaped(flat: Tensor, like: Vector) -> Vector:
    parts = torch.split(flat, [x.numel() for x in like])
    return [part.view(x.shape) for part, x in zip(parts, like, strict=True)]


def truncated(options: Truncated, g: BaseGradient, d: Vector, adapt: Adapt) -> Vector:
    """D * sum of (I - H D)^k d."""
    term = total = d
    for _ in range(options.steps - 1):
        term = axpy(term, -1.0, g.hessian_product(adapt(term)))
        total = axpy(total, 1.0, term)
    return adapt(total)


_SOLVERS: dict[type[Implicit], Callable[..., Vector]] = {
    T1T2: identity,
    Neumann: neumann,
    ConjugateGradient: conjugate_gradient,
    Nystrom: nystrom,
}
