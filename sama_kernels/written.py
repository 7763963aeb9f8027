"""`unwritten`: what a closure must leave alone while it runs, theta and the parameters of other modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)  # not DTensors or quantised parameters, whose memory is not compared


@contextmanager
def unwritten(name: str, base_params: Sequence[Tensor], others: Sequence[Tensor] = ()) -> Iterator[None]:
    """Raise after the closure `name` has run in this block if it wrote theta or one of `others`.

    Written in place, as `nn.Embedding(max_norm=...)` does, theta could not be brought back. Given other memory
    (`weight.data = renormalised`), it comes back here. Other memory with the same contents (`flatten_parameters()`) is
    no change; on a GPU comparing the contents waits for it, the one case where something is compared. What is written
    in place through `.data` is not noticed: torch counts no version there.

    Arguments:
        others: parameters that are neither theta nor lambda (`parameters_besides`). A loss that moves them, like a
            momentum encoder, is another function in every pass.
    Raises:
        RuntimeError: it did.
    """
    watched = (*base_params, *others)
    versions = [p._version for p in watched]
    aliases = [(i, p, p.detach()) for i, p in enumerate(watched) if type(p) in _PLAIN]  # they keep the memory
    replaced: list[int] = []
    try:
        yield
    finally:
        for i, param, alias in aliases:
            if param.data_ptr() != alias.data_ptr() and _differ(param, alias):
                param.data = alias
                replaced.append(i)
    written = [i for i, (p, version) in enumerate(zip(watched, versions, strict=True)) if p._version != version]
    changed = sorted({*replaced, *written})
    if not changed:
        return
    if changed[0] < len(base_params):
        changed = [i for i in changed if i < len(base_params)]
        raise RuntimeError(
            f"{name}: it writes base parameters ({len(changed)}; the first is tensor {changed[0]}, shape"
            f" {tuple(watched[changed[0]].shape)}), as nn.Embedding(max_norm=...) and a max-norm constraint"
            " (weight.data = renorm(weight.data)) do in forward; a meta step cannot give back what was written: do it"
            " after optimizer.step() instead, under torch.no_grad()"
        )
    raise RuntimeError(
        f"{name}: it writes parameters that are neither base_params nor meta_params ({len(changed)}; the first has"
        f" shape {tuple(watched[changed[0]].shape)}), as a momentum encoder that follows in forward does: in each pass"
        " it would be another function; move them after optimizer.step() instead, or register them as buffers, which"
        " come back after each pass"
    )


def parameters_besides(modules: Iterable[nn.Module], *known: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The parameters in none of the lists `known`, each once; not those without memory of their own, or versions."""
    listed = {id(x) for tensors in known for x in tensors}
    found = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
    others = (p for key, p in found.items() if key not in listed)
    return tuple(p for p in others if not (nn.parameter.is_lazy(p) or p.is_inference() or p.layout != torch.strided))


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors in different memory hold different things. Not if one was freed by its owner."""
    if a.untyped_storage().size() == 0 or b.untyped_storage().size() == 0:
        return False
    return a.dtype != b.dtype or a.device != b.device or not torch.equal(a, b)
