"""Other tensors in the places of the base parameters, for closures that read them through modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Place = tuple[dict[str, Any], str, int]
"""`_parameters` of a module, a name in it, and the row of the parameter."""


def places(modules: Sequence[nn.Module], params: Sequence[Tensor]) -> list[Place]:
    """Where `params` are in `modules`.

    Raises:
        ValueError: one of them is in none.
    """
    row_of = {id(p): row for row, p in enumerate(params)}
    found: list[Place] = [
        (module._parameters, name, row_of[id(p)])
        for module in modules
        for name, p in module._parameters.items()
        if id(p) in row_of
    ]
    missing = set(range(len(params))) - {row for *_, row in found}
    if missing:
        raise ValueError(
            f"base_params: tensor {min(missing)} was found in no module, where it has to be exchanged; let the"
            " closures reach its module through a variable, an attribute or an argument (of functools.partial)"
        )
    return found


@contextmanager
def substituted(where: Sequence[Place], theta: Sequence[Tensor]) -> Iterator[None]:
    """Closures see the tensors `theta`, one per base parameter, in the places of those."""
    before = [parameters[name] for parameters, name, _ in where]
    try:
        for parameters, name, row in where:
            parameters[name] = theta[row]
        yield
    finally:
        for (parameters, name, _), p in zip(where, before, strict=True):
            parameters[name] = p
