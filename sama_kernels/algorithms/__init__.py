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
from sama_kernels.algorithms.penalty import BOME, F2SA, PenaltyStep
from sama_kernels.algorithms.second_order import second_order

__all__ = [
    "BOME",
    "F2SA",
    "T1T2",
    "Algorithm",
    "ConjugateGradient",
    "Iterative",
    "Neumann",
    "Nystrom",
    "PenaltyStep",
    "Sama",
    "SamaNA",
    "Truncated",
    "second_order",
]
