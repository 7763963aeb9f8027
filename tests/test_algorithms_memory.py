"""The vectors that the implicit algorithms work on: memory as documented, and nobody else's tensors changed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from op_cases import SEED
from problems import relative_error
from torch import Tensor, nn

import sama_kernels as sk
from sama_experiments.common.memory import peak_bytes
from sama_kernels.algorithms import T1T2, Algorithm, ConjugateGradient, Iterative, Neumann, Nystrom, adam_step
from sama_kernels.algorithms.hessian import ROW, dot

N = 500_000
# Vectors of theta's size that are alive at once: those of the docs' table, and one that autograd makes meanwhile.
VECTORS: list[tuple[Algorithm, int]] = [
    (T1T2(), 1),
    (Neumann(terms=3), 3),
    (ConjugateGradient(iterations=3), 4),
    (Nystrom(rank=4), 7),
]


def meta_grad(theta: nn.Module, p: Tensor, lam: Tensor, algorithm: Algorithm) -> Tensor:
    """L_base = (p^2 / 2 + lambda p).sum(): H is the identity, and what autograd returns for H w may be w itself."""
    return sk.meta_grad(
        lambda: (p.square() / 2 + lam * p).sum(), lambda: (p**3 / 3).sum(), base_params=theta, meta_params=[lam],
        optimizer=None, adaptation="none", algorithm=algorithm,
    ).grads[0]  # fmt: skip


@pytest.mark.parametrize(("algorithm", "vectors"), VECTORS)
def test_memory(algorithm: Algorithm, vectors: int) -> None:
    torch.manual_seed(SEED)
    theta = nn.ParameterList([torch.randn(N)])
    lam = torch.ones((), requires_grad=True)
    meta_grad(theta, theta[0], lam, algorithm)
    peak, _ = peak_bytes(lambda: meta_grad(theta, theta[0], lam, algorithm), torch.device("cpu"))
    graph, _ = peak_bytes(lambda: one_product(theta[0], lam), torch.device("cpu"))
    assert peak < (vectors + 0.5) * 4 * N + graph, f"{peak / 4 / N:.2f} n, of which the graph {graph / 4 / N:.2f} n"


def test_memory_of_iterative(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Adam: g, theta', m', s', the adjoints of theta' and g, and the graph; of each further step the first four
    and its graph, as documented."""
    torch.manual_seed(SEED)
    parts = 20
    monkeypatch.setattr(adam_step, "PIECE", N // parts)
    theta = nn.ParameterList([torch.randn(N // parts) for _ in range(parts)])
    lam = torch.ones((), requires_grad=True)
    optimizer = torch.optim.Adam(theta)

    def base_loss() -> Tensor:
        return lam * torch.stack([p.square().sum() for p in theta]).sum()  # its graph: n

    def run(steps: int) -> None:
        sk.meta_grad(
            base_loss, lambda: torch.stack([p.square().sum() for p in theta]).sum(), base_params=theta,
            meta_params=[lam], optimizer=optimizer, algorithm=Iterative(steps=steps, advance=True),
        )  # fmt: skip

    base_loss().backward()
    optimizer.step()
    run(1)
    peaks = {steps: peak_bytes(partial(run, steps), torch.device("cpu"))[0] / 4 / N for steps in (1, 2, 5)}
    assert peaks[1] < 7.5, peaks
    assert peaks[5] - peaks[2] < 3 * 5.1, peaks


def one_product(p: Tensor, lam: Tensor) -> None:
    """The graph of the base gradient, and what a product with the Hessian on it takes besides its result."""
    (g,) = torch.autograd.grad((p.square() / 2 + lam * p).sum(), p, create_graph=True)
    torch.autograd.grad(g, [p, lam], torch.ones_like(p), retain_graph=True)


@pytest.mark.parametrize(
    "algorithm", [Neumann(terms=3, step_size=0.3), ConjugateGradient(damping=0.5), Nystrom(rank=6, damping=0.5)]
)
def test_products_that_autograd_hands_through(algorithm: Algorithm) -> None:
    print(f"repeat with SAMA_TEST_SEED={SEED}")
    torch.manual_seed(SEED)
    theta, lam = nn.ParameterList([torch.randn(6).double()]), torch.zeros(6).double().requires_grad_()
    factor = 0.3 * sum(0.7**k for k in range(4)) if isinstance(algorithm, Neumann) else 1 / 1.5
    got = meta_grad(theta, theta[0], lam, algorithm)
    assert relative_error(got, -factor * theta[0].detach().square()) < 1e-9


def test_dot_is_as_good_as_in_float64() -> None:
    torch.manual_seed(SEED)
    for sizes in ((3 * ROW + 5,), (ROW,), (7, 0, 1), (2_000_003,)):
        a, b = ([torch.randn(s) + 0.5 for s in sizes] for _ in range(2))
        expected = sum(float(x.double() @ y.double()) for x, y in zip(a, b, strict=True))
        scale = sum(float(x.double().norm() * y.double().norm()) for x, y in zip(a, b, strict=True))
        assert abs(float(dot(a, b)) - expected) < 1e-7 * scale
        half = [x.bfloat16() for x in a]
        wide = sum(float(x.double().square().sum()) for x in half)
        assert abs(float(dot(half, half)) / wide - 1) < 1e-6
