"""`BufferGuard`: the buffers of modules (BatchNorm statistics), which a meta step must leave as it found them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from weakref import WeakSet

import torch
from torch import Tensor, nn

_compared: WeakSet[nn.Module] = WeakSet()  # found in a meta step that changed no other module's buffers
Saved = list[tuple[str, Tensor, Tensor, int]]


class BufferGuard:
    """Buffers of all modules that the closures run.

    `with BufferGuard(modules) as buffers:` saves them, `buffers.restore()` puts them back so that the next pass sees
    the same function, and leaving the block restores them, whatever happened.

    Which other modules run is learnt from a forward pre-hook on all modules, however the closures reach them.
    torch.compile would trace that hook, break its graphs at it and warn about it; so where compiled code is in play
    (`compiled`), `modules` are all those that `reach` found, and there is no hook. In the first meta step with new
    modules, or new code (`first`), the other modules of the process are compared before and after: a buffer that
    changed there is an error, not a silent difference.
    """

    def __init__(self, modules: Iterable[nn.Module], *, compiled: bool = False, first: bool = False) -> None:
        self._modules = tuple(modules)
        self._compiled = compiled
        self._compare = compiled and (first or any(m not in _compared for m in self._modules))
        self._saved: dict[nn.Module, Saved] = {}
        self._others: list[tuple[nn.Module, str, Tensor, int]] = []
        self._cleanup = ExitStack()

    def __enter__(self) -> BufferGuard:
        for root in self._modules:
            for module in root.modules():
                self._save(module)
        if not self._compiled:
            handle = nn.modules.module.register_module_forward_pre_hook(self._before_forward(threading.get_ident()))
            self._cleanup.callback(handle.remove)
        if self._compare:
            self._others = [
                (module, name, buffer, buffer._version)
                for module in _living_modules()
                if module not in self._saved
                for name, buffer in module._buffers.items()
                if buffer is not None and not buffer.is_inference()
            ]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._cleanup.close()
        self.restore()
        if self._compare and kind is None:
            self._compare_others()
            _compared.update(self._modules)

    def restore(self) -> None:
        """Put every buffer seen so far back: the same tensor objects with the same contents and version counters."""
        with torch.no_grad():
            for module, buffers in self._saved.items():
                for name, buffer, contents, version in buffers:
                    module._buffers[name] = buffer
                    buffer.copy_(contents)
                    torch._C._autograd._unsafe_set_version_counter((buffer,), (version,))

    def moved(self) -> Callable[[], None]:
        """What brings every buffer seen so far to what it is now, for after the block."""
        now = [(m._buffers, name, m._buffers[name]) for m, saved in self._saved.items() for name, *_ in saved]
        values = [(buffers, name, b, b.detach().clone()) for buffers, name, b in now if b is not None]

        def bring() -> None:
            for buffers, name, buffer, contents in values:
                buffers[name] = buffer.copy_(contents)

        return bring

    def _save(self, module: nn.Module) -> None:
        if module._buffers and module not in self._saved:
            self._saved[module] = [
                (name, b, b.detach().clone(), b._version) for name, b in module._buffers.items() if b is not None
            ]

    def _before_forward(self, thread: int) -> Callable[[nn.Module, object], None]:
        def hook(module: nn.Module, _: object) -> None:
            if threading.get_ident() == thread:  # the hook is global, but other threads' modules are not ours
                self._save(module)

        return hook

    def _compare_others(self) -> None:
        changed = sorted({type(m).__name__ for m, name, b, version in self._others if _is_changed(m, name, b, version)})
        if changed:
            raise RuntimeError(
                f"base_loss, meta_loss: buffers of {', '.join(changed)} changed in the meta step, but with"
                " torch.compile in play this module could not be found in advance; let the closures reach it through a"
                " variable, an attribute or an argument (of functools.partial)"
            )


def _is_changed(module: nn.Module, name: str, buffer: Tensor, version: int) -> bool:
    """Whether a buffer was written to, or replaced; torch.compile takes graphs of its own apart, which is no change."""
    replaced = module._buffers.get(name) is not buffer and not isinstance(module, torch.fx.GraphModule)
    return replaced or buffer._version != version


def _living_modules() -> Iterable[nn.Module]:
    """All modules of this process (70 ms with transformers imported)."""
    return (x for x in gc.get_objects() if issubclass(type(x), nn.Module) and "_buffers" in x.__dict__)
