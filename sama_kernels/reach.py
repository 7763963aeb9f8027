"""What the closures of a meta step can reach: the modules whose buffers they may change, compiled code, generators.

Found by looking, without running anything: the variables that a function closes over, the globals that its code names,
`self`, the arguments of partials, containers, the attributes of objects.
"""

from __future__ import annotations

import argparse
import functools
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from operator import itemgetter
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn

from sama_kernels.generators import is_generator
from sama_kernels.trees import modules_of

# A closure over a data set of millions must not slow the meta step down.
_LIMIT = 20_000  # objects looked at
_LONG = 1_000  # elements of one container looked at
# Attributes of every module that lead to no other; `modules()` gives its submodules.
_STATE = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
# What every module has, in this order and before its own attributes; most of it is hooks, and most modules have none.
_COMMON = [*vars(nn.Module())]
_hooks_of = itemgetter(*(i for i, name in enumerate(_COMMON) if name not in _STATE | {"training"}))
_LEAVES = (Tensor, str, bytes, int, float, complex, type, type(None))
_LEAF_TYPES = {Tensor, nn.Parameter, str, int, float, bool, type(None)}  # most attributes of modules: told apart fast
_CONTAINERS = (list, tuple, set, frozenset, deque)
_OPEN = (nn.Module, SimpleNamespace, argparse.Namespace)  # searched for attributes, whoever wrote them
# Objects of these packages are not searched for attributes, nor is their code.
_CLOSED = {"torch", "numpy", "sama_kernels", "builtins", *sys.stdlib_module_names} - {"__main__"}


@dataclass
class Reach:
    """The modules that were found, submodules included, whether any of it goes through torch.compile, and generators.

    None of it is complete: code may look things up by names made at run time. `buffers.BufferGuard` has a second line.
    """

    modules: dict[nn.Module, None] = field(default_factory=dict)
    compiled: bool = False
    generators: list[object] = field(default_factory=list)


def reachable(roots: Iterable[object]) -> Reach:
    """Follow `roots` (closures, modules, lists of tensors), nearest things first."""
    found = Reach()
    queue = deque(map(_itself, roots))
    classes = _Classes(_packages(queue))
    seen: dict[int, object] = {}
    met: dict[int, object] = {}  # keeps them alive too
    while queue and len(seen) < _LIMIT:
        item = queue.popleft()
        if id(item) in seen:
            continue
        together = [item]
        if isinstance(item, nn.Module) and item not in found.modules:  # at once, not after the rest of a container
            inside = [m for m in modules_of(item) if m not in found.modules]
            found.modules.update(dict.fromkeys(inside))
            together += (m for m in inside if m is not item)
        for one in together:
            seen[id(one)] = one  # keeps it alive, so that its id stays its own
            kind = classes.known.get(type(one)) or classes.of(one)
            found.compiled = found.compiled or _is_compiled(one)
            if kind.draws:
                found.generators.append(one)
            for x in _neighbours(one, kind):
                if type(x) in _LEAF_TYPES or id(x) in met:
                    continue
                met[id(x)] = x
                x = _itself(x)
                if not isinstance(x, _LEAVES) and not (isinstance(x, dict) and not x):
                    queue.append(x)
    return found


def _itself(item: Any) -> object:
    """What a weak proxy stands for (Lightning's modules have one of their Trainer's), None if that is gone."""
    if type(item) not in weakref.ProxyTypes:
        return item
    try:
        return item.__init__.__self__
    except ReferenceError:
        return None


class _Kind(NamedTuple):
    """What a search needs to know of the class of an object.

    Attributes:
        is_module: modules that are no containers as well. draws: random number generators.
        is_open: whether their attributes are searched. slots: the names of more of them.
        functions: of the class; those of its first object alone.
        searched: the packages that the closures are written in.
    """

    is_module: bool
    draws: bool
    is_open: bool
    slots: tuple[str, ...]
    functions: list[FunctionType]
    searched: set[str]


class _Classes:
    """The classes that one search has met, looked at once each: a model has many modules of few classes."""

    def __init__(self, searched: set[str]) -> None:
        self._searched = searched
        self._library: dict[type, bool] = {}  # whether a class is, which many are derived from
        self.known: dict[type, _Kind] = {}

    def of(self, item: object) -> _Kind:
        """What is not `known` yet."""
        kind = type(item)
        is_open = isinstance(item, _OPEN) or not _from(kind, _CLOSED)
        for base in kind.__mro__:
            if base not in self._library:
                self._library[base] = _is_library(base, self._searched)
        bases = [base for base in kind.__mro__ if not self._library[base]]
        functions = [x for base in bases for x in vars(base).values() if isinstance(x, FunctionType)]
        is_module = issubclass(kind, nn.Module) and not issubclass(kind, (dict, *_CONTAINERS))
        first = _Kind(is_module, is_generator(kind), is_open, _slots(kind), functions, self._searched)
        self.known[kind] = first._replace(functions=[])
        return first


def _is_compiled(item: object) -> bool:
    """Whether `torch.compile` made this function or module, or `module.compile()` was called. What is kept from being
    compiled (`stop_gradient` is) has such an attribute too."""
    attributes = getattr(item, "__dict__", {})
    made = "_torchdynamo_orig_callable" in attributes and not attributes.get("_torchdynamo_disable")
    return made or attributes.get("_compiled_call_impl") is not None


def _slots(kind: type) -> tuple[str, ...]:
    """The names of the slots of a class and of those that it inherits from."""
    found: list[str] = []
    for base in kind.__mro__:
        own = vars(base).get("__slots__", ())
        found.extend([own] if isinstance(own, str) else own)
    return tuple(found)


def _neighbours(item: Any, kind: _Kind) -> Iterable[object]:
    """The objects that `item` leads to."""
    if kind.is_module:  # most of what there is
        return _of_object(item, kind)
    if isinstance(item, FunctionType):
        return _of_function(item, kind.searched)
    if isinstance(item, MethodType):
        return (item.__self__, item.__func__)
    if isinstance(item, functools.partial):
        return (item.func, *item.args, *item.keywords.values())
    if isinstance(item, dict):
        return tuple(islice(item.values(), _LONG))  # at once, as other threads may work on it
    if isinstance(item, _CONTAINERS):
        return tuple(islice(item, _LONG))
    return _of_object(item, kind)


def _of_object(item: object, kind: _Kind) -> Iterable[object]:
    if not kind.is_open:
        return ()
    attributes = getattr(item, "__dict__", {}).copy()
    found = [*attributes.values()]
    if kind.is_module or isinstance(item, nn.Module):
        if [*attributes][: len(_COMMON)] == _COMMON and not any(_hooks_of(found)):
            del found[: len(_COMMON)]
        else:  # also ScriptModules, and modules that an older torch has saved
            found = [x for name, x in attributes.items() if name not in _STATE]
    if kind.slots or kind.functions:
        found += [getattr(item, name, None) for name in kind.slots]
        found += kind.functions
    return found


def _of_function(function: FunctionType, searched: set[str]) -> Iterator[object]:
    yield from vars(function).values()  # what decorators leave there: __wrapped__, torch.compile's original
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    if not _is_library(function, searched):
        yield from _globals(set(_names(function.__code__)), function.__globals__, searched)


def _globals(names: set[str], space: dict[str, Any], searched: set[str]) -> Iterator[object]:
    """What `names` stand for; also `package.module.model`, which is read by three of them."""
    for name in names & space.keys():
        value = space[name]
        if not isinstance(value, ModuleType):
            yield value
        elif not _is_library(value, searched):
            yield from _globals(names - {name}, vars(value), searched)


def _names(code: CodeType) -> Iterator[str]:
    """The global and attribute names that a function, and functions defined in it, read."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _from(item: Any, packages: set[str]) -> bool:
    """Whether a function or class is defined in one of `packages`."""
    return _package(item) in packages


def _package(item: Any) -> str:
    name = item.__name__ if isinstance(item, ModuleType) else getattr(item, "__module__", None)
    return (name or "").partition(".")[0]


def _packages(roots: Iterable[object]) -> set[str]:
    """Those that the closures are written in: these are searched wherever they lie."""
    found = set()
    for item in roots:
        if not isinstance(item, nn.Module):
            function = _innermost(item)
            found.add(_package(function if isinstance(function, FunctionType) else type(function)))
    return found


def _innermost(item: Any) -> Any:
    """Without what binds, wraps or decorates it."""
    while True:
        if isinstance(item, functools.partial):
            item = item.func
        elif isinstance(item, MethodType):
            item = item.__func__
        elif "__wrapped__" in getattr(item, "__dict__", {}):
            item = item.__dict__["__wrapped__"]
        else:
            return item


def _is_library(item: Any, searched: set[str]) -> bool:
    """Whether the code of a function, class or module works on what it is given, so that its globals lead nowhere.

    That is taken for granted of installed packages: without it the loss of a program that has a console of rich or a
    logger within reach is 5 ms of looking at every meta step, and 12,000 objects (50 ms) under pytest (AMD EPYC).
    """
    package = _package(item)
    return package in _CLOSED or (package not in searched and _is_installed(package))


_installed: dict[str, bool] = {}


def _is_installed(package: str) -> bool:
    """Whether it lies where pip puts packages (one that is being worked on, `pip install -e`, does not)."""
    if package not in _installed:
        module = sys.modules.get(package)
        if module is None:
            return False
        places = [*getattr(module, "__path__", ()), getattr(module, "__file__", None) or ""]
        _installed[package] = any({"site-packages", "dist-packages"} & set(Path(place).parts) for place in places)
    return _installed[package]
