"""Sharded parameters (FSDP2's `fully_shard`, tensor parallelism): the kernels work on this rank's part of a DTensor.

The element-wise ops need no other rank's elements; only norms are sums over all of them. No parameter is ever put
together here. `fully_shard` averages gradients over its ranks by itself, but in `.backward()` alone, and into `.grad`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sama_kernels.graphs import nodes
from sama_kernels.hooks import ACCUMULATED, unhooked

_ORDINARY = (Tensor, nn.Parameter)  # most of what is asked about, thousands of times in a meta step
_ranks_of_mesh: WeakKeyDictionary[Any, frozenset[int]] = WeakKeyDictionary()
Groups = tuple[Any, ...]
"""The process groups over which the elements of a tensor are divided, one per mesh dimension; () if they are not."""


def is_sharded(x: object) -> bool:
    """Whether `x` is a DTensor."""
    if type(x) in _ORDINARY:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # not imported: there are none, and importing takes a second
    return module is not None and isinstance(x, module.DTensor)


def is_offloaded(x: Any) -> bool:
    """Whether a DTensor's part is on another device than its computations (CPUOffloadPolicy on GPUs)."""
    return is_sharded(x) and x.device_mesh.device_type != x.device.type


def local(x: Any) -> Any:
    """This rank's part of a DTensor, sharing memory with it; also of those in a dict; anything else as it is."""
    if isinstance(x, dict):
        return {key: local(value) for key, value in x.items()}
    if not is_sharded(x):
        return x
    with torch.no_grad():  # with a graph it would be a view with a history
        return x.to_local()


def locals_of(tensors: Iterable[Any]) -> list[Any]:
    """`local` of each, most of which are no DTensors."""
    return [x if type(x) in _ORDINARY else local(x) for x in tensors]


def whole(x: Any) -> Tensor:
    """A DTensor put together, for single numbers such as norms; anything else as it is."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[no-any-return]


def like(part: Tensor, whole: Tensor) -> Tensor:
    """`part`, this rank's, as a DTensor sharded as `whole` is; as it is if that is no DTensor."""
    if not is_sharded(whole):
        return part
    placed: Any = whole
    made: Tensor = type(placed).from_local(
        part, placed.device_mesh, placed.placements, run_check=False, shape=placed.shape, stride=placed.stride()
    )
    return made


def groups_of(x: Any) -> Groups:
    """A sum over the local part of `x`, summed over these groups, counts each element once: ranks along the other mesh
    dimensions hold copies.

    Raises:
        ValueError: a placement that is neither a shard nor a replica.
    """
    if not is_sharded(x):
        return ()
    if any(placement.is_partial() for placement in x.placements):
        raise ValueError(f"base_params: a DTensor with placements {x.placements} holds addends, not a parameter")
    return tuple(x.device_mesh.get_group(dim) for dim in _sharded_dims(x))


def lacks_ranks(x: Any, group: Any) -> list[int]:
    """Those of a process group that have no part, or copy, of a DTensor; none of any other tensor."""
    if not is_sharded(x):
        return []
    if x.device_mesh not in _ranks_of_mesh:  # most models have one
        _ranks_of_mesh[x.device_mesh] = frozenset(x.device_mesh.mesh.flatten().tolist())
    return sorted({*dist.get_process_group_ranks(group or dist.group.WORLD)} - _ranks_of_mesh[x.device_mesh])


def part_number(x: Any) -> int:
    """Which part of a DTensor this rank has, counted over the mesh dimensions that divide it; 0 of any other tensor."""
    if not is_sharded(x):
        return 0
    number = 0
    for dim in _sharded_dims(x):
        number = number * x.device_mesh.size(dim) + x.device_mesh.get_local_rank(dim)
    return number


def _sharded_dims(x: Any) -> list[int]:
    return [dim for dim, placement in enumerate(x.placements) if not placement.is_replicate()]


def sum_over(value: Tensor, groups: Groups) -> Tensor:
    """`value` summed over process groups, one after the other, in place."""
    for group in groups:
        dist.all_reduce(value, group=group)
    return value


def by_groups(params: Sequence[Tensor], rows: Iterable[int]) -> dict[Groups, list[int]]:
    """The rows of `params` that are divided over the same ranks."""
    rows = list(rows)
    found: dict[Groups, list[int]] = {}
    if rows and all(type(params[row]) in _ORDINARY for row in rows):
        return {(): rows}
    for row in rows:
        found.setdefault(groups_of(params[row]), []).append(row)
    return found


def is_freed(x: Tensor) -> bool:
    """Whether `x` is a whole parameter that FSDP had put together and has let go of since."""
    return type(x) is nn.Parameter and x.numel() > 0 and x.layout == torch.strided and x.untyped_storage().size() == 0


def gradients(loss: Tensor, inputs: Sequence[Tensor], owned: dict[int, Tensor]) -> list[Tensor | None]:
    """Like `torch.autograd.grad`, None where `loss` does not read an input; of a DTensor this rank's part.

    `owned`: from `managed`. If some of the inputs are in it, the gradients come through `.backward()`; every `.grad` is
    set aside meanwhile.
    """
    if not any(id(x) in owned for x in inputs):
        grads = list(torch.autograd.grad(loss, inputs, allow_unused=True))
        return [g if g is None or type(g) is Tensor else _placed(g, x) for g, x in zip(grads, inputs, strict=True)]
    leaves = [x for x in {id(x): x for x in (*owned.values(), *inputs, *_leaves(loss))}.values() if x.is_leaf]
    with _grads_aside(leaves), unhooked(leaves, ACCUMULATED):
        kept: dict[int, Tensor] = {}
        others = [(row, x) for row, x in enumerate(inputs) if not x.is_leaf]
        handles = [x.register_hook(_keep(kept, row)) for row, x in others]  # type: ignore[no-untyped-call]
        try:
            # Beyond lambda that is computed from other tensors lies the caller's graph, which is not ours to free.
            loss.backward(retain_graph=bool(others))  # type: ignore[no-untyped-call]
        finally:
            for handle in handles:
                handle.remove()
        found = [kept.get(row) if not x.is_leaf else x.grad for row, x in enumerate(inputs)]
    return [g if g is None else _placed(g, x) for g, x in zip(found, inputs, strict=True)]


def _keep(kept: dict[int, Tensor], row: int) -> Callable[[Tensor], None]:
    def hook(grad: Tensor) -> None:
        kept[row] = grad

    return hook


def placed_as(grad: Any, x: Any) -> Tensor:
    """A gradient that lies where its parameter does: sequence parallelism leaves sums in `.grad` that are not yet made,
    and the optimizer makes them for itself."""
    if not is_sharded(grad) or grad.placements == x.placements:
        return grad  # type: ignore[no-any-return]
    return _placed(grad, x)


def _placed(grad: Any, x: Any) -> Tensor:
    """The local part of a gradient, placed as its parameter is: autograd may leave sums that are not yet made."""
    if not is_sharded(grad):
        return grad  # type: ignore[no-any-return]
    with torch.no_grad():
        placed = grad if grad.placements == x.placements else grad.redistribute(x.device_mesh, x.placements)
        part: Tensor = placed.to_local()
    return part


@contextmanager
def _grads_aside(leaves: Sequence[Tensor]) -> Iterator[None]:
    grads = [x.grad for x in leaves]
    try:
        for x in leaves:
            x.grad = None
        yield
    finally:
        for x, grad in zip(leaves, grads, strict=True):
            x.grad = grad


def _leaves(loss: Tensor) -> list[Tensor]:
    """The leaves that a backward pass from `loss` would accumulate gradients in."""
    return [node.variable for node in nodes([loss]) if hasattr(node, "variable")]
