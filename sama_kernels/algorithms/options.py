"""Which algorithm finds the meta gradient: one small dataclass each, with its options, its cost and its sources.

F: one forward pass of a loss; a backward pass counts as 2 F. K: the option that counts steps. n: the size of theta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Algorithm:
    """What `meta_grad(algorithm=...)` takes, besides the names in `NAMES`."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool):
                if not isinstance(value, bool):
                    raise TypeError(f"{self._name()}: {field.name} must be True or False, got {value!r}")
            elif isinstance(field.default, int):
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ValueError(f"{self._name()}: {field.name} must be an integer >= 1, got {value!r}")
            elif not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise ValueError(f"{self._name()}: {field.name} must be finite and >= 0, got {value!r}")

    def _name(self) -> str:
        return f"algorithm: {type(self).__name__}"


@dataclass(frozen=True)
class Sama(Algorithm):
    """SAMA (paper, Eq. 5): w = D d, the mixed derivative by a difference. 3 F + 2 F; memory: n.

    The options of the difference are arguments of `meta_grad`.
    """


@dataclass(frozen=True)
class SamaNA(Algorithm):
    """SAMA without the adaptation to the optimizer: adaptation="none", w = d."""


@dataclass(frozen=True)
class Implicit(Algorithm):
    """The implicit function theorem: dL_meta/dlambda = -(d^2 L_base / dlambda dtheta) w with w = H^-1 d, H the Hessian
    of L_base in theta (paper, Eq. 2). The mixed derivative is exact, by double backward. What differs is how w is
    found. Each solver makes Hessian-vector products on one graph of the base gradient (Pearlmutter, "Fast exact
    multiplication by the Hessian", 1994), which is kept meanwhile: 3 F for it, about 4 F per product.

    adapt: w <- D w in the end, D = du/dg of the optimizer: paper, Eq. 4.
    """

    adapt: bool = False


@dataclass(frozen=True)
class T1T2(Implicit):
    """H = I (Luketina et al., "Scalable gradient-based tuning of continuous regularization hyperparameters", 2016).

    With `adapt` this is SAMA with an exact mixed derivative. 3 F + 3 F + 4 F; memory: n and the graph.
    """


@dataclass(frozen=True)
class Neumann(Implicit):
    """w = step_size * sum over k = 0 .. terms of (I - step_size H)^k d (Lorraine, Vicol and Duvenaud, "Optimizing
    millions of hyperparameters by implicit differentiation", 2020). It converges to H^-1 d if step_size is below
    2 / the largest eigenvalue of H, and H is positive. T1T2's cost + terms * 4 F; memory: 3 n and the graph.
    """

    terms: int = 5
    step_size: float = 0.1


@dataclass(frozen=True)
class ConjugateGradient(Implicit):
    """(H + damping I) w = d by conjugate gradients (Hestenes and Stiefel 1952; iMAML: Rajeswaran et al. 2019), begun
    at w = 0. It ends early when the residual is zero. T1T2's cost + iterations * 4 F; memory: 4 n and the graph.
    """

    iterations: int = 5
    damping: float = 0.0


@dataclass(frozen=True)
class Nystrom(Implicit):
    """w = (C H_KK^+ C^T + damping I)^-1 d with `rank` random columns C of H, by Woodbury's formula (Hataya and Yamada,
    "Nystroem method for accurate and scalable implicit differentiation", 2023). The columns are drawn from torch's
    generator. T1T2's cost + rank * 4 F; memory: (rank + 3) n and the graph.
    """

    rank: int = 5
    damping: float = 0.01


@dataclass(frozen=True)
class Truncated(Algorithm):
    """Recurrent back-propagation, truncated (Almeida 1987; Pineda 1987; Liao et al. 2018; Shaban et al. 2019): reverse
    mode through `steps` steps theta <- theta - u(g) of the base optimizer that stand still at theta, so that each has
    the Jacobian I - D H: w = D * sum over k < steps of (I - H D)^k d. What a step carries over in the optimizer's
    state is left out. One step is T1T2(adapt=True). T1T2's cost + (steps - 1) * 4 F; memory: 3 n and the graph.
    """

    steps: int = 5


@dataclass(frozen=True)
class Iterative(Algorithm):
    """Reverse mode through `steps` further steps of the real optimizer, its state included, from where theta is
    (Maclaurin et al. 2015; Franceschi et al. 2017; DARTS' second-order step is steps=1 with SGD: Liu et al. 2019).
    Afterwards theta and the optimizer's state are what they were, unless `advance` is set.

    advance: leave theta and the optimizer's state where the steps led to: they are base steps then, and the training
    loop makes no others. After an error all is as it was.
    per_step: base_loss is a list of `steps` closures, one for each step; otherwise each step takes all of base_loss.
    checkpoint: keep theta and the state of each step instead of its graph, which is made again in the backward pass.
    Cost: steps * 9 F + 3 F (checkpoint: steps * 12 F + 3 F); memory: steps * (4 n for
    Adam and AdamW, whose step has its derivative in closed form, or what autograd keeps of others + the graph of a base
    gradient), or steps * 3 n + one graph. The optimizer must have torch's `differentiable` option.
    """

    steps: int = 1
    per_step: bool = False
    checkpoint: bool = False
    advance: bool = False


NAMES: dict[str, type[Algorithm]] = {
    "sama": Sama,
    "sama_na": SamaNA,
    "t1_t2": T1T2,
    "neumann": Neumann,
    "conjugate_gradient": ConjugateGradient,
    "nystrom": Nystrom,
    "truncated": Truncated,
    "iterative": Iterative,
}
"""The names that `meta_grad(algorithm=...)` takes, each for the defaults of its class."""


def resolve(algorithm: object) -> Algorithm:
    """`algorithm`, or the one of that name.

    Raises:
        ValueError: no algorithm has this name. TypeError: neither a name nor an `Algorithm`.
    """
    if isinstance(algorithm, str):
        if algorithm not in NAMES:
            raise ValueError(f"algorithm: {algorithm!r} is none of {', '.join(map(repr, NAMES))}")
        return NAMES[algorithm]()
    if not isinstance(algorithm, Algorithm):
        raise TypeError(
            f"algorithm: expected a name or an options object of sama_kernels.algorithms, such as Neumann(terms=10),"
            f" got {algorithm!r}"
        )
    return algorithm
