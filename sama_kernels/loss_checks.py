"""Checks of what closures return and do, each one clear error that names the closure and the cure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sama_kernels.graphs import nodes
from sama_kernels.trees import instances


def scalar_loss(name: str, loss: Any, reads: str) -> None:
    """Raise unless `loss` is a scalar float tensor with a graph to the parameters called `reads`."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name}: must return a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(
            f"{name}: must return a scalar, got shape {tuple(loss.shape)}; reduce it with .mean() or .sum()"
        )
    if not loss.is_floating_point():
        raise TypeError(f"{name}: must return a real floating-point scalar, got {loss.dtype}; take .real or .abs()")
    if not loss.requires_grad:
        raise ValueError(
            f"{name}: its result has no gradient with respect to {reads}: it does not read them, or it was detached"
            " or computed under no_grad"
        )


@contextmanager
def inner_gradients() -> Iterator[None]:
    """torch's error about a base loss that differentiates with respect to theta itself, as one that names the cure."""
    try:
        yield
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise ValueError(
            "base_loss: it seems to differentiate with respect to base_params by itself (torch.autograd.grad or"
            " .backward()), but they are frozen in the perturbed passes; use torch.func.grad with"
            " torch.func.functional_call, which differentiates with respect to its arguments"
        ) from error


def dense(name: str, grads: Sequence[Tensor | None]) -> None:
    """Raise if one of the gradients is sparse."""
    sparse = [i for i, g in enumerate(grads) if g is not None and g.layout != torch.strided]
    if sparse:
        raise TypeError(f"{name}: tensor {sparse[0]} gets a sparse gradient; build the embedding with sparse=False")


def whole_graph(name: str, loss: Tensor, grads: Sequence[Tensor | None]) -> None:
    """Raise if a gradient may be None only because the graph of `loss` has a reentrant checkpoint in it.

    What is read inside one has no edge in the graph; only a full `.backward()` reaches it.
    """
    if all(g is not None for g in grads):
        return
    for node in nodes([loss]):
        refuse_reentrant(name, node)


def refuse_reentrant(name: str, node: Any) -> None:
    """Raise if this node of a loss's graph is a reentrant checkpoint."""
    if node.name() == "CheckpointFunctionBackward":
        raise ValueError(
            f"{name}: it uses reentrant checkpointing, which hides the parameters inside it from"
            " torch.autograd.grad; use checkpoint(..., use_reentrant=False), in transformers"
            ' gradient_checkpointing_kwargs={"use_reentrant": False}'
        )


def no_renormalisation(modules: Iterable[nn.Module], base_params: Sequence[Tensor]) -> None:
    """Raise if an embedding among theta rewrites its weight in forward (`max_norm`)."""
    theta = {id(p) for p in base_params}
    for module in instances(modules, (nn.Embedding, nn.EmbeddingBag)):
        if module.max_norm is not None and id(module.weight) in theta:
            raise ValueError(
                f"base_params: an nn.{type(module).__name__}(max_norm={module.max_norm}) renormalises its weight in"
                " forward, also at theta+-, and theta could not be brought back; build it without max_norm and"
                " renormalise the rows after optimizer.step(), under torch.no_grad()"
            )


def no_parametrization_cache(modules: Iterable[nn.Module]) -> None:
    """Raise if `torch.nn.utils.parametrize.cached()` is on around the meta step: it has the weights of theta."""
    if parametrize._cache_enabled and any(map(parametrize.is_parametrized, modules)):
        raise RuntimeError(
            "base_loss, meta_loss: torch.nn.utils.parametrize.cached() is on, and would give the perturbed passes the"
            " weights that it computed at theta; use it inside the closures, not around the meta step"
        )
