"""The other algorithms for meta gradients, called like SAMA: `meta_grad(..., algorithm=Neumann(terms=10))`."""

from sama_kernels.algorithms.options import (
    T1T2,
    Algorithm,
    ConjugateGradient,
    Iterative,
    Neumann,
    Nystrom,
    Sama,
    SamaNA,
    Truncated,
)
from sama_kernels.algorithms.second_order import second_order

__all__ = [
    "T1T2",
    "Algorithm",
    "ConjugateGradient",
    "Iterative",
    "Neumann",
    "Nystrom",
    "Sama",
    "SamaNA",
    "Truncated",
    "second_order",
]
