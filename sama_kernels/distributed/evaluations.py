"""Closures whose modules make collectives of their own (FSDP, tensor parallelism), where one rank may raise.

The others would wait in a collective that it never makes. So the hosts meet before each forward pass of such a module,
and when the closure is over: at the next meeting all learn that a rank has failed, before anyone waits for it. They do
not learn of one that fails within such a forward pass, or in a backward pass, whose collectives others have begun.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sama_kernels.distributed.meeting import Failed, all_say, stay_away


class Evaluations:
    """Those of one meta step.

    Attributes:
        known: every rank knows that one has failed.
    """

    def __init__(self, group: Any, modules: Iterable[nn.Module]) -> None:
        self._group = group
        self._modules = set(map(id, modules))
        self._inside: nn.Module | None = None  # of the modules, the outermost one whose forward pass has begun
        self.known = False

    @contextmanager
    def one(self, expected: type[Exception]) -> Iterator[None]:
        """Around a closure; `expected`: what it may raise on all ranks alike, which is no failure."""
        thread = threading.get_ident()
        self._inside = None

        def before(module: nn.Module, args: Any) -> None:
            if self._inside is None and id(module) in self._modules and threading.get_ident() == thread:
                self._meet()
                self._inside = module

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if module is self._inside:
                self._inside = None

        hooks = nn.modules.module
        handles = hooks.register_module_forward_pre_hook(before), hooks.register_module_forward_hook(after)
        try:
            yield
        except expected:
            raise
        except Exception:
            if not self.known and self._inside is None:
                stay_away(self._group)
                self.known = True
            raise
        finally:
            for handle in handles:
                handle.remove()
        self._meet()

    def _meet(self) -> None:
        try:
            all_say(self._group, "")
        except Failed:
            self.known = True
            raise
