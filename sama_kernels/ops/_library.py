"""Registration shared by the ops: one schema each, fake kernels, and the reference as the kernel of last resort.

The schema is defined in Python, so it exists where nothing is compiled. The compiled extension adds a kernel for its
dispatch key (CPU) to the same op, and `torch.compile` sees one op whatever runs underneath.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_library = torch.library.Library("sama", "DEF")  # type: ignore[no-untyped-call]


def define(schema: str, *, reference: Callable[..., object], fake: Callable[..., object]) -> None:
    """Define `sama::<schema>` with `reference` as its kernel on every device that has no compiled one.

    Arguments:
        schema: the op in schema language, e.g. ``"restore(Tensor(a!)[] params, Tensor[] bits) -> ()"``.
        reference: plain-PyTorch kernel, same arguments as the schema.
        fake: kernel for fake tensors: allocates outputs of the right shape and dtype, reads no data.
    """
    name = schema.partition("(")[0]
    _library.define(schema)  # type: ignore[no-untyped-call]
    _library.impl(name, reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"sama::{name}", fake, lib=_library)


def written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that `tensors` were changed in place.

    Ops with list arguments do not bump version counters; without this, a later backward through a graph that saved
    one of these tensors would silently use the changed values instead of raising.
    """
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)
