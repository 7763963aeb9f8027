"""Registration shared by the ops: one schema each, fake kernels, and the reference as the kernel of last resort.

The schema is defined in Python, so it exists where nothing is compiled. A compiled extension adds a kernel for its
dispatch key (CPU, CUDA) to the same op, and `torch.compile` sees one op whatever runs underneath.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sama_kernels.backends import triton

_library = torch.library.Library("sama", "DEF")  # type: ignore[no-untyped-call]


def define(schema: str, *, reference: Callable[..., object], fake: Callable[..., object]) -> None:
    """Define `sama::<schema>` with `reference` as its kernel on every device that has no compiled one.

    And `sama::<name>_triton`, the same op run by the Triton kernels, so that a caller can choose between them and
    those that are compiled for the device.

    Arguments:
        schema: the op in schema language, e.g. ``"restore(Tensor(a!)[] params, Tensor[] bits) -> ()"``.
        reference: plain-PyTorch kernel, same arguments as the schema.
        fake: kernel for fake tensors: allocates outputs of the right shape and dtype, reads no data.
    """
    name = schema.partition("(")[0]

    def run_triton(*arguments: object) -> object:
        return triton.kernel(name)(*arguments)  # imported when first used: triton need not be installed

    for op, kernel in ((name, reference), (f"{name}_triton", run_triton)):
        _library.define(schema.replace(name, op, 1))  # type: ignore[no-untyped-call]
        _library.impl(op, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"sama::{op}", fake, lib=_library)


def refuse_gradients(op: str, **lists: Sequence[Tensor]) -> None:
    """Raise RuntimeError if autograd records operations on one of these tensors, by their arguments' names.

    The ops have no derivative: a backward pass or a forward-mode derivative would go past them as if they had not been
    there, with nothing but a warning, or none.
    """
    recorded = _recorded if forward_ad._current_level >= 0 else _requires_grad if torch.is_grad_enabled() else None
    if recorded is None:
        return
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            if recorded(x):
                raise RuntimeError(
                    f"sama::{op}: {name}[{i}] takes part in a derivative, and the op has none; call it under"
                    " torch.no_grad(), with detached tensors"
                )


def _requires_grad(x: Tensor) -> bool:
    return x.requires_grad


def _recorded(x: Tensor) -> bool:
    tangent = forward_ad.unpack_dual(x).tangent  # type: ignore[no-untyped-call]
    return tangent is not None or (torch.is_grad_enabled() and x.requires_grad)


def fake_norm_sq(v: Sequence[Tensor], *_: object) -> Tensor:
    """The fake kernel of the `adapt_norm` ops, which return ||v||^2."""
    return v[0].new_empty((), dtype=torch.float64)


def written(*lists: Sequence[Tensor]) -> None:
    """Tell autograd that the tensors of `lists` were changed in place.

    Ops with list arguments do not bump version counters; without this, a later backward through a graph that saved
    one of these tensors would silently use the changed values instead of raising.
    """
    if not torch.compiler.is_compiling():
        for tensors in lists:
            torch.autograd.graph.increment_version(tensors)
