"""What a loss must be like for algorithms that differentiate its gradient, or put other tensors in theta's place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor

from sama_kernels.graphs import is_once_differentiable, nodes
from sama_kernels.loss_checks import refuse_reentrant


def check_loss(name: str, loss: Tensor, theta: Sequence[Tensor] = (), base_params: Sequence[Tensor] = ()) -> None:
    """Raise if the loss hides parameters from the algorithm.

    Arguments:
        theta: what stands in the places of `base_params`, if other tensors do.
    Raises:
        ValueError: reentrant checkpointing, whose parameters are not in the graph; or the loss reads one of base_params
            where `theta` stands in its place.
    """
    replaced = {id(p): i for i, (p, x) in enumerate(zip(base_params, theta, strict=True)) if x is not p}
    for node in nodes([loss], until=theta):
        refuse_reentrant(name, node)
        i = replaced.get(id(getattr(node, "variable", None)))
        if i is not None:
            raise ValueError(
                f"{name}: it reads base parameter {i} (shape {tuple(base_params[i].shape)}) otherwise than through its"
                " module, for instance from a list made before, where it stays the old one while the algorithm makes"
                " its steps; read it through the module each time (model.parameters() inside the closure), or use SAMA"
            )


def check_gradient(gradient: Sequence[Tensor | None], until: Sequence[Tensor] = ()) -> None:
    """Raise NotImplementedError if the graph of a base gradient lacks something. `until`: where it began."""
    if is_once_differentiable([x for x in gradient if x is not None], until):
        raise _lacking("an autograd.Function of it is once_differentiable")


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """torch's errors about missing second derivatives as one that names the cure."""
    try:
        yield
    except RuntimeError as error:
        if "is not implemented" not in str(error) and "double backward" not in str(error):
            raise
        raise _lacking(str(error).partition("\n")[0]) from error


def _lacking(why: str) -> NotImplementedError:
    return NotImplementedError(
        f"algorithm: it needs second derivatives of base_loss ({why}); use SAMA, which needs none, or if this is fused"
        ' attention, unfused attention (attn_implementation="eager" in transformers, or'
        " torch.nn.attention.sdpa_kernel(SDPBackend.MATH))"
    )
