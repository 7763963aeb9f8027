"""Other tensors in the places of the base parameters, for closures that read them through modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
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


class _NotNow(Tensor):
    """Stands for base parameters that no one value can be given to."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(
            "algorithm: Iterative goes back through all steps at once, but base_loss or meta_loss computes activations"
            " again in backward (torch.utils.checkpoint), which would need the parameters of one step; use"
            " Iterative(..., checkpoint=True), which goes back step by step, or turn activation checkpointing off"
        )


def nowhere(where: Sequence[Place], count: int) -> AbstractContextManager[None]:
    """Within the block reading one of the `count` base parameters is an error."""
    return substituted(where, [torch.empty(0).as_subclass(_NotNow)] * count)
