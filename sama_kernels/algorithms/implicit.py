"""w of the implicit algorithms: what they put for H^-1 d. The formulas and their sources: `options`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sama_kernels.algorithms.hessian import BaseGradient, Vector, add_, dot, scale_add_
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
"""w -> D w, in new memory or in that of w."""


def solve(algorithm: Algorithm, g: BaseGradient, d: Vector, adapt: Adapt) -> Vector:
    """w of dL_meta/dlambda = -(d^2 L_base / dlambda dtheta) w. `d` is used up: its memory may become that of w.

    What `hessian_product` returns may be memory of the graph, or its argument, and is only read.
    """
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
    total, term = d, _copy(d)
    for _ in range(options.terms):
        add_(term, -options.step_size, g.hessian_product(term))
        add_(total, 1.0, term)
    return [x.mul_(options.step_size) for x in total]


def conjugate_gradient(options: ConjugateGradient, g: BaseGradient, d: Vector) -> Vector:
    """Without a look at the residual on the host: once it is 0, the steps are 0 too."""
    w = [torch.zeros_like(x) for x in d]
    residual, direction = d, _copy(d)
    square = dot(residual, residual)
    for _ in range(options.iterations):
        product = g.hessian_product(direction)
        curvature = dot(direction, product)
        if options.damping:  # H + damping I, without a copy of the product
            curvature = curvature + options.damping * dot(direction, direction)
        length = _ratio(square, curvature)
        add_(w, length, direction)
        add_(residual, -length, product)
        del product
        if options.damping:
            add_(residual, -length * options.damping, direction)
        previous, square = square, dot(residual, residual)
        scale_add_(direction, _ratio(square, previous), residual)
    return w


def _copy(d: Vector) -> Vector:
    return [x.clone() for x in d]


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, 0.0, a / b)


PIECE = 2**16  # elements of each column of H that are in float64 at a time


def nystrom(options: Nystrom, g: BaseGradient, d: Vector) -> Vector:
    """With C = H[:, K] and r = damping: w = d / r - C (H_KK + C^T C / r)^-1 C^T d / r^2.

    The small system is ill-conditioned, and w a difference of near numbers: in float64, a piece at a time.
    """
    r = options.damping
    if r == 0:
        raise ValueError("algorithm: Nystrom needs damping > 0, as a low-rank matrix has no inverse")
    n = sum(x.numel() for x in d)
    chosen = torch.randperm(n, device=d[0].device)[: min(options.rank, n)].clone()  # not all n in memory
    columns = [torch.empty(len(chosen), x.numel(), dtype=x.dtype, device=x.device) for x in d]
    unit = [torch.zeros_like(x) for x in d]
    inner = torch.zeros(len(chosen), len(chosen), dtype=torch.float64, device=chosen.device)
    for k in range(len(chosen)):
        _fill(unit, chosen[k], 1.0)
        product = g.hessian_product(unit)
        for row, x in zip(columns, product, strict=True):
            row[k] = x.flatten()
        inner[:, k] = _entries(product, chosen)
        _fill(unit, chosen[k], 0.0)
    right = torch.zeros_like(inner[0])
    for c, x in _pieces(columns, d):
        wide = c.double()
        inner += wide @ wide.T / r
        right += wide @ x.double()
    # `inner` is singular where the loss has no curvature (a dead unit). Not lstsq: on a GPU it assumes full rank, on a
    # CPU its default driver, gelsy, reads pivots that nobody wrote and finds other ranks by chance (pytorch #187411).
    solution = torch.linalg.pinv(inner, hermitian=True) @ right
    for c, x in _pieces(columns, d):
        x.copy_(x.double() / r - solution @ c.double() / r**2)
    return d


def _fill(vector: Vector, place: Tensor, value: float) -> None:
    """vector[place] = value, `place` counted over all its tensors and left on the device."""
    start = 0
    for x in vector:
        inside = (place >= start) & (place < start + x.numel())
        flat = x.view(-1)
        at = (place - start).clamp(0, max(x.numel() - 1, 0))[None]
        if x.numel():
            flat.index_copy_(0, at, torch.where(inside, value, flat[at]))
        start += x.numel()


def _entries(vector: Vector, places: Tensor) -> Tensor:
    """vector[places], float64."""
    found, start = torch.zeros(len(places), dtype=torch.float64, device=places.device), 0
    for x in vector:
        if x.numel():
            inside = (places >= start) & (places < start + x.numel())
            values = x.reshape(-1)[(places - start).clamp(0, x.numel() - 1)].double()
            found = torch.where(inside, values, found)
        start += x.numel()
    return found


def _pieces(columns: Sequence[Tensor], d: Vector) -> Iterator[tuple[Tensor, Tensor]]:
    """(some columns of `columns`, the same elements of `d`), views."""
    for c, x in zip(columns, d, strict=True):
        yield from zip(torch.split(c, PIECE, dim=1), torch.split(x.view(-1), PIECE), strict=True)


def truncated(options: Truncated, g: BaseGradient, d: Vector, adapt: Adapt) -> Vector:
    """D * sum of (I - H D)^k d."""
    total, term = d, _copy(d)
    for _ in range(options.steps - 1):
        add_(term, -1.0, g.hessian_product(adapt(term)))
        add_(total, 1.0, term)
    return adapt(total)


_SOLVERS: dict[type[Implicit], Callable[..., Vector]] = {
    T1T2: identity,
    Neumann: neumann,
    ConjugateGradient: conjugate_gradient,
    Nystrom: nystrom,
}
