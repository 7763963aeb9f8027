"""`trees` lists what torch lists, in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from sama_kernels.trees import modules_of, parameters_of


class Tied(nn.Module):
    """The same module in two places, the same parameter in two modules, an empty place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 3)
        self.again, self.nothing = self.first[0], None
        self.second.weight = self.again.weight
        self.register_parameter("none", None)
        self.register_module("missing", None)


class Hiding(nn.Sequential):
    """Shows its submodules in a way of its own."""

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        yield from list(super().named_modules(*args, **kwargs))[:2]


class Choosy(nn.Sequential):
    """Shows some of its parameters."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        yield from list(super().named_parameters(*args, **kwargs))[1:]


def shadowed() -> nn.Module:
    """Methods of an object, not of its class."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    model[1].named_modules = lambda *_, **__: iter(())
    model.parameters = lambda *_, **__: iter(())  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    "make",
    [
        Tied,
        lambda: nn.Sequential(Tied(), Hiding(nn.Linear(2, 2), Tied())),
        lambda: nn.Sequential(Choosy(nn.Linear(2, 2)), Tied()),
        lambda: Choosy(nn.Linear(2, 2), nn.Linear(2, 2)),
        lambda: Hiding(nn.Linear(2, 2), nn.Linear(2, 2)),
        lambda: nn.Sequential(torch.jit.trace(nn.Linear(2, 2), torch.ones(2)), nn.Linear(2, 2)),
        lambda: nn.TransformerEncoderLayer(8, 2),
        lambda: nn.ParameterList([torch.ones(2), torch.ones(3)]),
        shadowed,
    ],
)
def test_lists_are_those_of_torch(make: Any) -> None:
    model = make()
    assert [*map(id, modules_of(model))] == [*map(id, model.modules())]
    assert [*map(id, parameters_of(model))] == [*map(id, model.parameters())]
