"""What closures reach: modules and compiled code, found without running anything."""

from __future__ import annotations

import functools
import importlib
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sama_kernels as sk
from sama_kernels import reach
from sama_kernels.reach import reachable

X = torch.ones(2, 3)
GLOBAL = nn.BatchNorm1d(3)
HOLDER: dict[str, Any] = {"models": [nn.BatchNorm1d(3)]}


def helper() -> Tensor:
    return HOLDER["models"][0](X)


@dataclass(slots=True)
class Slots:
    model: nn.Module

    def loss(self) -> Tensor:
        return self.model(X).sum()

    def __call__(self) -> Tensor:
        return self.loss()


class InheritedSlots(Slots):
    __slots__ = "extra"  # a single name


class Trainer:
    def __init__(self, model: nn.Module) -> None:
        self.parts = {"student": (model,)}

    def loss(self) -> Tensor:
        return self.parts["student"][0](X).sum()


class Wrapper(nn.Module):
    """A module that hides another one from `modules()`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.hidden = [model]
        self.scale = torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](x * self.scale)


class UsesGlobal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return GLOBAL(x)


def by_cell(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: model(X).sum()


def by_inner_function(model: nn.Module) -> Callable[[], Tensor]:
    def outer() -> Tensor:
        def inner() -> Tensor:
            return model(X).sum()

        return inner()

    return outer


def by_default(model: nn.Module) -> Callable[[], Tensor]:
    def loss(x: Tensor = X, *, net: nn.Module = model) -> Tensor:
        return net(x).sum()

    return loss


def by_decorator(model: nn.Module) -> Callable[[], Tensor]:
    def twice(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        @functools.wraps(function)
        def wrapper() -> Tensor:
            return 2 * function()

        return wrapper

    return twice(sk.recorded(by_cell(model)))


def by_other_file(model: nn.Module) -> Callable[[], Tensor]:
    package, part = ModuleType("their_package"), ModuleType("their_package.part")
    part.model = model  # type: ignore[attr-defined]
    package.part = part  # type: ignore[attr-defined]
    scope = {"their_package": package, "X": X, "__name__": "script"}
    exec("def loss():\n return their_package.part.model(X).sum()", scope)
    return scope["loss"]  # type: ignore[return-value]


def beside_much_data(model: nn.Module) -> Callable[[], Tensor]:
    data = [(i, i) for i in range(100_000)]
    return lambda: model(data[0][0] * X).sum()


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "cell": by_cell,
    "inner function": by_inner_function,
    "default": by_default,
    "decorator": by_decorator,
    "other file": by_other_file,
    "much data": beside_much_data,
    "bound method": lambda model: Trainer(model).loss,
    "slots": lambda model: Slots(model),
    "inherited slots": lambda model: InheritedSlots(model),
    "single slot": lambda model: single_slot(model),
    "method of slots": lambda model: Slots(model).loss,
    "partial": lambda model: functools.partial(lambda net, x: net(x).sum(), model, x=X),
    "keyword of partial": lambda model: functools.partial(lambda x, net: net(x).sum(), X, net=model),
    "namespace": lambda model: by_cell(SimpleNamespace(inner=model)),  # type: ignore[arg-type]
    "list in a submodule": lambda model: by_cell(nn.Sequential(Wrapper(model))),
    "submodule": lambda model: by_cell(nn.Sequential(nn.Sequential(model))),
    "hook": lambda model: by_cell(nn.Sequential(nn.Sequential(hooked(model)))),
}


def single_slot(model: nn.Module) -> InheritedSlots:
    slots = InheritedSlots(nn.Identity())
    slots.extra = model
    return slots


def hooked(model: nn.Module) -> nn.Module:
    other = nn.Identity()
    other.register_forward_hook(lambda module, args, output: model(output))
    return other


@pytest.mark.parametrize("way", WAYS)
def test_modules_and_compiled_code_are_found(way: str) -> None:
    model = nn.BatchNorm1d(3)
    found = reachable([WAYS[way](model)])
    assert model in found.modules and not found.compiled
    compiled = nn.BatchNorm1d(3)
    compiled.compile(backend="eager")
    assert reachable([WAYS[way](compiled)]).compiled


def test_globals_are_found_by_name() -> None:
    assert set(reachable([lambda: GLOBAL(X) + helper()]).modules) == {GLOBAL, HOLDER["models"][0]}
    assert GLOBAL in reachable([UsesGlobal()]).modules
    assert not reachable([lambda: X.sum()]).modules


def by_calling(function: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    return lambda: function(X)


LIBRARY = """
from torch import nn, ones
MODEL = nn.BatchNorm1d(3)
def called(x): return MODEL(x).sum()
def loss(): return called(ones(2, 3))
class Object:
    def loss(self): return called(ones(2, 3))
class Holder:
    def __init__(self, model): self.model = model
"""


def test_code_of_installed_packages_is_searched_only_if_the_closure_is_written_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, name in (("site-packages", "installed_one"), ("work", "edited_one")):
        (tmp_path / place).mkdir()
        (tmp_path / place / f"{name}.py").write_text(LIBRARY)
        monkeypatch.syspath_prepend(tmp_path / place)
    installed, edited = importlib.import_module("installed_one"), importlib.import_module("edited_one")
    assert edited.MODEL in reachable([by_calling(edited.called)]).modules
    assert not reachable([by_calling(installed.called)]).modules
    for made in (lambda f: f, sk.recorded, functools.partial, lambda f: functools.wraps(f)(lambda: f())):
        assert installed.MODEL in reachable([made(installed.loss)]).modules
        assert installed.MODEL in reachable([made(installed.Object().loss)]).modules
    model = nn.Linear(3, 3)  # what an object of the package holds is found in any case
    holder = installed.Holder(model)
    assert list(reachable([lambda: holder.model(X).sum()]).modules) == [model]


def test_a_console_or_a_test_runner_within_reach_costs_little() -> None:
    """Numbers of objects, not time: without the rule above 12,000."""
    console, request = pytest.importorskip("rich.console").Console(), pytest.mark.parametrize
    looked_at = []

    def loss() -> Tensor:
        console.print(request, pytest.raises)
        return X.sum()

    def counted(item: Any, searched: set[str]) -> Any:
        looked_at.append(item)
        return neighbours(item, searched)

    neighbours = reach._neighbours
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reach, "_neighbours", counted)
        reachable([loss])
    assert 2 < len(looked_at) < 300


@pytest.mark.parametrize("recorded", [False, True])
def test_every_kind_of_compiled_code_is_found(recorded: bool) -> None:
    model = nn.Linear(3, 3)
    kinds = [by_cell(torch.compile(model, backend="eager")), torch.compile(by_cell(model), backend="eager")]
    for closure in kinds:
        found = reachable([sk.recorded(closure) if recorded else closure])
        assert found.compiled and model in found.modules


def test_nothing_is_run() -> None:
    class Loud:
        @property
        def model(self) -> nn.Module:
            raise AssertionError("ran")

        def __bool__(self) -> bool:
            raise AssertionError("ran")

    loud = Loud()
    assert not reachable([lambda: loud.model]).modules


def test_cycles_and_large_data_end_quickly() -> None:
    ring: list[Any] = []
    ring.append(ring)
    data = [ring, *({"index": i} for i in range(300_000))]
    start = time.perf_counter()
    assert not reachable([lambda: data[0]]).modules
    assert time.perf_counter() - start < 1  # about 0.01 s; all of it would take much longer
    assert sys.getrefcount(ring) < 6


class Holder:
    model: nn.Module


def test_weak_proxies() -> None:
    """Lightning's modules have one of their trainer's; isinstance says that they are what they stand for."""
    model, holder, gone = nn.Linear(3, 3), Holder(), nn.Linear(1, 1)
    holder.model = nn.Linear(2, 2)
    proxies = [weakref.proxy(model), weakref.proxy(holder), weakref.proxy(gone)]
    del gone
    assert set(reachable([lambda: proxies]).modules) == {model, holder.model}
    assert set(reachable([proxies[0]]).modules) == {model}


def test_what_is_kept_from_being_compiled_is_not_compiled_code() -> None:
    """`from sama_kernels import stop_gradient` in a program is no reason to do without the hooks on its modules."""
    from sama_kernels import recorded, stop_gradient

    model = nn.Linear(2, 1)

    @torch.compiler.disable
    def mean(x: Tensor) -> Tensor:
        return x.mean()

    def loss() -> Tensor:
        losses = model(torch.ones(3, 2)).square()
        return mean(stop_gradient(losses) * losses)

    loss()  # the first call of each sets its attributes
    for closure in (loss, recorded(loss)):
        found = reachable([closure])
        assert model in found.modules and not found.compiled
    compiled = torch.compile(model, backend="eager")

    @torch.compiler.disable
    def through() -> Tensor:
        return compiled(torch.ones(3, 2)).mean()

    assert reachable([through]).compiled
