"""`Unwritten`: what a closure must leave alone while it runs, theta and the parameters of other modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)  # not DTensors or quantised parameters, whose memory is not compared


class Unwritten:
    """Theta and other parameters, watched through the passes of a meta step.

    Arguments:
        others: parameters that are neither theta nor lambda (`parameters_besides`). A loss that moves them, like a
            momentum encoder, is another function in every pass.
    """

    def __init__(self, base_params: Sequence[Tensor], others: Sequence[Tensor] = ()) -> None:
        self._base_params = base_params
        self._watched = (*base_params, *others)
        self._plain = [p for p in self._watched if type(p) in _PLAIN]
        self._aliases: list[Tensor] = []  # of `_plain`: they keep the memory, so that no other gets its addresses
        self._places: list[int] = []

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Raise after the closure `name` has run in this block if it wrote theta or one of the others.

        Written in place, as `nn.Embedding(max_norm=...)` does, theta could not be brought back. Given other memory
        (`weight.data = renormalised`), it comes back here. Other memory with the same contents (`flatten_parameters()`)
        is no change; on a GPU comparing the contents waits for it, the one case where something is compared. What is
        written in place through `.data` is not noticed: torch counts no version there.

        Raises:
            RuntimeError: it did.
        """
        versions = [p._version for p in self._watched]
        places = [p.data_ptr() for p in self._plain]
        if places != self._places:
            self._aliases, self._places = [p.data for p in self._plain], places
        replaced: list[Tensor] = []
        try:
            yield
        finally:
            if [p.data_ptr() for p in self._plain] != places:
                replaced = self._brought_back()
        if replaced or [p._version for p in self._watched] != versions:
            self._refuse(name, versions, replaced)

    def _brought_back(self) -> list[Tensor]:
        """The parameters that were given other memory with other contents, which have their own again."""
        replaced = []
        for param, alias, place in zip(self._plain, self._aliases, self._places, strict=True):
            if param.data_ptr() != place and _differ(param, alias):
                param.data = alias
                replaced.append(param)
        return replaced

    def _refuse(self, name: str, versions: Sequence[int], replaced: Sequence[Tensor]) -> None:
        moved = {id(p) for p in replaced}
        moved |= {id(p) for p, version in zip(self._watched, versions, strict=True) if p._version != version}
        changed = [i for i, p in enumerate(self._watched) if id(p) in moved]
        if changed[0] < len(self._base_params):
            changed = [i for i in changed if i < len(self._base_params)]
            raise RuntimeError(
                f"{name}: it writes base parameters ({len(changed)}; the first is tensor {changed[0]}, shape"
                f" {tuple(self._watched[changed[0]].shape)}), as nn.Embedding(max_norm=...) and a max-norm constraint"
                " (weight.data = renorm(weight.data)) do in forward; a meta step cannot give back what was written: do"
                " it after optimizer.step() instead, under torch.no_grad()"
            )
        raise RuntimeError(
            f"{name}: it writes parameters that are neither base_params nor meta_params ({len(changed)}; the first has"
            f" shape {tuple(self._watched[changed[0]].shape)}), as a momentum encoder that follows in forward does: in"
            " each pass it would be another function; move them after optimizer.step() instead, or register them as"
            " buffers, which come back after each pass"
        )


def parameters_besides(modules: Iterable[nn.Module], *known: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The parameters in none of the lists `known`, each once; not those without memory of their own, or versions."""
    listed = {id(x) for tensors in known for x in tensors}
    own = (m._parameters for m in modules if m._parameters)
    others = {
        id(p): p for of_module in own for p in of_module.values() if p is not None and id(p) not in listed
    }.values()
    return tuple(p for p in others if not (nn.parameter.is_lazy(p) or p.is_inference() or p.layout != torch.strided))


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors in different memory hold different things. Not if one was freed by its owner."""
    if a.untyped_storage().size() == 0 or b.untyped_storage().size() == 0:
        return False
    return a.dtype != b.dtype or a.device != b.device or not torch.equal(a, b)
