"""FSDP2 (`fully_shard`): which parameters it gathers and reduces, and what it remembers of passes.

It has no interface for most of this; what is read here is there in torch 2.11 to 2.14.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from sama_kernels.trees import instances


def fsdp_modules(modules: Iterable[nn.Module]) -> tuple[Any, ...]:
    """Those of `modules` that `fully_shard` was called on.

    Raises:
        NotImplementedError: one of them is wrapped in its predecessor.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return ()
    modules = tuple(modules)
    if instances(modules, fsdp.FullyShardedDataParallel):
        raise NotImplementedError(
            "base_params, meta_params: FullyShardedDataParallel (FSDP1) keeps parameters in flat buffers of its own and"
            " is not supported; use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    return tuple(instances(modules, fsdp.FSDPModule))


def synchronising(modules: Iterable[Any]) -> None:
    """Raise if FSDP is told not to reduce gradients: then those of its parameters never come."""
    for module in modules:
        if not all(group.reduce_grads and group.all_reduce_grads for group in _groups(module)):
            raise ValueError(
                "base_params, meta_params: set_requires_gradient_sync(False) or set_requires_all_reduce(False) is in"
                " force, as for gradient accumulation; set it to True before the last backward() of a step, and so"
                " before the meta step"
            )


def managed(modules: Iterable[Any]) -> dict[int, Tensor]:
    """The parameters that these FSDP modules gather, and whose gradients they reduce, by id."""
    params = (p.sharded_param for m in modules for group in _groups(m) for p in group.fsdp_params)
    return {id(p): p for p in params}  # not `ignored_params`, which may be DTensors too


def averages_over(modules: Iterable[Any], params: Iterable[Tensor]) -> set[int]:
    """The ranks over which these FSDP modules average the gradients of `params`."""
    ours = {id(p) for p in params}
    groups = (g for m in modules for g in _groups(m) if any(id(p.sharded_param) in ours for p in g.fsdp_params))
    return {rank for group in groups for rank in group.mesh_info.mesh.mesh.flatten().tolist()}


def reshard(modules: Iterable[Any]) -> None:
    """Let go of the parameters that FSDP has gathered: the next forward pass gathers them from the moved parts."""
    for module in modules:
        for group in _groups(module):  # what was prefetched, and has not been used, would be used later
            pending, group._all_gather_result = group._all_gather_result, None
            if pending is not None and pending.all_gather_event is not None:
                group.device_handle.current_stream().wait_event(pending.all_gather_event)
            if pending is not None and isinstance(pending.all_gather_work, dist.Work):
                pending.all_gather_work.wait()
            _leave_forward(group)
        _leave_forward(module._get_fsdp_state())
        module.reshard()


def _leave_forward(owner: Any) -> None:
    """A forward pass that an exception has left is not over for FSDP, which keeps the root's parameters until then."""
    if owner._training_state.name == "FORWARD":
        owner._training_state = type(owner._training_state).IDLE
    context = getattr(owner, "_state_ctx", None)
    if context is not None and context.iter_forward_root is owner:
        context.iter_forward_root = None


def leave_passes(modules: Iterable[Any]) -> None:
    """After an exception: no module is within a forward or a backward pass, has gradients of it, or is gathered.

    Only the end of a backward pass would make FSDP ready for the next one: it would not reduce gradients any more, or
    add those that were left.
    """
    modules = tuple(modules)
    for module in modules:
        state = module._get_fsdp_state()
        state._training_state = type(state._training_state).IDLE
        state._state_ctx.iter_forward_root = None
        state._state_ctx.post_backward_final_callback_queued = False
        getattr(state, "_modules_to_run_forward", set()).clear()
        for group in _groups(module):
            group._training_state = type(group._training_state).IDLE
            _wait_for_reductions(group)
            for p in group.fsdp_params:
                p.unsharded_accumulated_grad = None
                if hasattr(p, "_unsharded_param"):
                    p._unsharded_param.grad = None
    reshard(modules)
    forget_forward_passes(modules)


def _wait_for_reductions(group: Any) -> None:
    """Of gradients that nobody will use: their memory may go when they are over."""
    context = group.comm_ctx
    states = getattr(context, "reduce_scatter_states", None)  # torch 2.11: one, or None
    if states is None:
        states, context.reduce_scatter_state = [context.reduce_scatter_state], None
    reductions = [*states, group._all_reduce_state]
    events = [group._post_reduce_event, *(x.event for x in reductions if x is not None)]
    for event in events:
        if event is not None:
            group.device_handle.current_stream().wait_event(event)
    if isinstance(getattr(context, "reduce_scatter_states", None), list):
        context.reduce_scatter_states.clear()
    group._post_reduce_event = group._all_reduce_state = None


def forget_forward_passes(modules: Iterable[Any]) -> None:
    """FSDP notes the order of its modules for prefetching in the backward pass, which clears it. After perturbed
    passes, which have none, the next backward pass would go by their order (torch 2.13: it gathers one layer twice)."""
    for module in modules:
        for group in _groups(module):
            group.comm_ctx.post_forward_order.clear()
            group._post_forward_indices.clear()


def _groups(module: Any) -> Iterable[Any]:
    """The parameters that FSDP gathers together."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.11: at most one
    return groups if groups is not None else filter(None, [state._fsdp_param_group])
