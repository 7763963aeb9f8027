"""`BufferGuard`: the buffers of modules (BatchNorm statistics), which a meta step must leave as it found them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._functorch import pyfunctorch

from sama_kernels.shared_memory import Memory

_compared: WeakSet[nn.Module] = WeakSet()  # found in a meta step that changed no other module's buffers


Slots = dict[str, Tensor | None]


class _Saved(NamedTuple):
    """What a tensor held. `cells`: each of its cells once; `version`: None if it does not count them."""

    buffer: Tensor
    cells: Tensor
    contents: Tensor
    version: int | None


class BufferGuard:
    """Buffers of all modules that the closures run.

    `with BufferGuard(modules, base_params) as buffers:` saves them, `buffers.restore()` puts them back so that the next
    pass sees the same function, and leaving the block restores them, whatever happened.

    `modules`, all that `reach` found, are saved at once, whatever the closures will do with them (a memory bank may be
    written without a call). Which others they run is learnt from a forward pre-hook on all modules, and which tensors
    are buffers for one call (`torch.func.functional_call`, also under vmap); also which modules another thread runs,
    and it alone: those are left to it. torch.compile would trace that hook, break its graphs at it and warn about it;
    so where compiled code is in play (`compiled`) there is none. In the first meta step with new modules, or new code
    (`first`), the other modules of the process are compared before and after then: a buffer that changed there is an
    error, not a silent difference.

    A buffer in the memory of a base parameter moves with it, and is left alone.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        base_params: Sequence[Tensor],
        *,
        compiled: bool = False,
        first: bool = False,
    ) -> None:
        self._modules = tuple(modules)
        self._theta = Memory(base_params)
        self._compiled = compiled
        self._compare = compiled and (first or any(m not in _compared for m in self._modules))
        self._slots: dict[nn.Module, Slots] = {}
        self._bare: dict[nn.Module, None] = {}  # those of `modules` that had no buffers: most, looked at in one go
        self._saved: dict[int, _Saved] = {}  # by the id of the tensor, which it keeps alive
        self._ours: set[nn.Module] = set()  # seen to run here
        self._theirs: set[nn.Module] = set()  # seen to run in another thread
        self._others: list[tuple[nn.Module, str, Tensor, int]] = []
        self._cleanup = ExitStack()

    def __enter__(self) -> BufferGuard:
        self._bare = {m: None for m in self._modules if not m._buffers}
        for module in self._modules:
            if module not in self._bare:
                self._save(module)
        if not self._compiled:
            handle = nn.modules.module.register_module_forward_pre_hook(self._before_forward(threading.get_ident()))
            self._cleanup.callback(handle.remove)
        if self._compare:
            self._others = [
                (module, name, buffer, buffer._version)
                for module in _living_modules()
                if module not in self._slots and module not in self._bare
                for name, buffer in _slots_of(module).items()
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
        theirs = self._theirs - self._ours
        for module in [m for m in self._bare if m._buffers]:
            if module not in theirs:
                _fill(module, {})
        for module, slots in self._slots.items():
            if module not in theirs:
                _fill(module, slots)
        not_ours = {id(b) for module in theirs for b in self._slots.get(module, {}).values()}
        saved = [s for key, s in self._saved.items() if key not in not_ours]
        _write([(s.cells, s.contents) for s in saved])
        counted = [(s.buffer, s.version) for s in saved if s.version is not None]
        if counted:
            tensors, versions = zip(*counted, strict=True)
            torch._C._autograd._unsafe_set_version_counter(tensors, versions)

    def moved(self) -> Callable[[], None]:
        """What brings every buffer seen so far to what it is now, for after the block."""
        theirs = self._theirs - self._ours
        slots = {module: _slots_of(module) for module in (*self._slots, *self._bare) if module not in theirs}
        buffers = {id(b): b for of_module in slots.values() for b in of_module.values() if b is not None}
        values = [(cells := _cells(b), cells.detach().clone()) for b in buffers.values() if b not in self._theta]

        def bring() -> None:
            for module, of_module in slots.items():
                _fill(module, of_module)
            _write(values)

        return bring

    def _save(self, module: nn.Module) -> None:
        """The buffers of a module, unless that is done. Of one that `reach` has not found they are those at its first
        call (which may not be a functional_call)."""
        if module not in self._slots and module not in self._bare:
            self._slots[module] = _slots_of(module)
        new = [b for b in module._buffers.values() if id(b) not in self._saved]
        if new:
            self._save_contents(new)

    def _save_contents(self, buffers: Iterable[Tensor | None]) -> None:
        inside = torch._C._functorch.peek_interpreter_stack() is not None  # of vmap or grad
        with pyfunctorch.temporarily_clear_interpreter_stack() if inside else nullcontext():
            for buffer in buffers:
                while buffer is not None and torch._C._functorch.is_functorch_wrapped_tensor(buffer):
                    buffer = torch._C._functorch.get_unwrapped(buffer)
                if buffer is None or id(buffer) in self._saved or nn.parameter.is_lazy(buffer):
                    continue
                if buffer not in self._theta:
                    cells = _cells(buffer)
                    version = None if buffer.is_inference() else buffer._version
                    self._saved[id(buffer)] = _Saved(buffer, cells, cells.detach().clone(), version)

    def _before_forward(self, thread: int) -> Callable[[nn.Module, object], None]:
        def hook(module: nn.Module, _: object) -> None:
            if not module._buffers:
                return
            if threading.get_ident() == thread:
                self._ours.add(module)
                self._save(module)
            else:
                self._theirs.add(module)

        return hook

    def _compare_others(self) -> None:
        changed = sorted({type(m).__name__ for m, name, b, version in self._others if _is_changed(m, name, b, version)})
        if changed:
            raise RuntimeError(
                f"base_loss, meta_loss: buffers of {', '.join(changed)} changed in the meta step, but with"
                " torch.compile in play this module could not be found in advance; let the closures reach it through a"
                " variable, an attribute or an argument (of functools.partial)"
            )


def _cells(x: Tensor) -> Tensor:
    """`x`, or where it is expanded (several elements in one cell, which cannot be written to) a view without that."""
    if x.layout != torch.strided or 0 not in x.stride() or x.numel() == 0:
        return x
    for dim, stride in enumerate(x.stride()):
        x = x.narrow(dim, 0, 1) if stride == 0 else x
    return x


def _slots_of(module: nn.Module) -> Slots:
    return dict(module._buffers.items())


def _fill(module: nn.Module, slots: Slots) -> None:
    now = module._buffers
    if not (now or slots) or [*map(id, now.values())] == [*map(id, slots.values())]:
        return
    if not isinstance(module, torch.jit.ScriptModule):  # has no dict; its code may replace no tensor
        now.clear()
        now.update(slots)


def _write(values: Sequence[tuple[Tensor, Tensor]]) -> None:
    """`cells.copy_(contents)` for all of them; on a GPU one launch for each dtype."""
    alike: dict[tuple[object, ...], list[tuple[Tensor, Tensor]]] = {}
    for cells, contents in values:
        plain = type(cells) is Tensor and cells.layout == torch.strided  # DTensors have no foreach copy
        kind = (cells.dtype, cells.device) if plain else (id(cells),)
        alike.setdefault((cells.is_inference(), *kind), []).append((cells, contents))
    for (inference, *_), pairs in alike.items():
        with torch.inference_mode() if inference else torch.no_grad():
            if len(pairs) == 1:
                pairs[0][0].copy_(pairs[0][1])
            else:
                torch._foreach_copy_([cells for cells, _ in pairs], [contents for _, contents in pairs])


def _is_changed(module: nn.Module, name: str, buffer: Tensor, version: int) -> bool:
    """Whether a buffer was written to, or replaced; torch.compile takes graphs of its own apart, which is no change."""
    replaced = _slots_of(module).get(name) is not buffer and not isinstance(module, torch.fx.GraphModule)
    return replaced or buffer._version != version


def _living_modules() -> Iterable[nn.Module]:
    """All modules of this process (70 ms with transformers imported)."""
    return (x for x in gc.get_objects() if issubclass(type(x), nn.Module) and "_buffers" in x.__dict__)
