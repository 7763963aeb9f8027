"""Checks of the arguments that concern several processes and sharded parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sama_kernels import checks
from sama_kernels.distributed.sharded import is_offloaded, is_sharded
from sama_kernels.types import Problem, Synchronisation

SYNCS = ("final", "full", "none")


def synchronisation(sync: str, group: Any, weight: Any, bucket_mib: Any, comm_hook: Any) -> Synchronisation | None:
    """The arguments that concern several processes; None if there is nothing to exchange.

    A group that is given is used even if it has one process only.
    """
    checks.choice("sync", sync, SYNCS)
    both = tuple(weight) if isinstance(weight, tuple | list) else (weight, weight)
    if weight is not None and (len(both) != 2 or not all(_is_weight(x) for x in both)):
        raise ValueError(f"weight: expected a finite number >= 0, or two (for base_loss and meta_loss), got {weight!r}")
    mib = checks.positive("bucket_mib", bucket_mib)
    if comm_hook is not None and not callable(comm_hook):
        raise TypeError(f"comm_hook: expected a function (group, bucket) -> future, got {comm_hook!r}")
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        if group is not None:
            raise ValueError("group: torch.distributed is not initialised; call torch.distributed.init_process_group")
        return None
    if group is not None and group == distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: this rank is not a member of it; pass a group that contains it")
    if group is not None and not isinstance(group, distributed.ProcessGroup):
        raise TypeError(f"group: expected a process group of torch.distributed, got {type(group).__name__}")
    if sync == "none" or (group is None and distributed.get_world_size() == 1):
        return None
    return Synchronisation(sync, group, None if weight is None else (float(both[0]), float(both[1])), mib, comm_hook)


def _is_weight(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and x >= 0 and math.isfinite(x)


def same_direction(problem: Problem) -> None:
    """Raise where what `fully_shard` puts together, theta+- or gradients of lambda, would belong to different v."""
    if not problem.owned or problem.synchronisation is not None or torch.distributed.get_world_size() == 1:
        return
    meta_owned = any(id(p) in problem.owned for p in problem.meta_params)
    base_owned = [id(p) in problem.owned for p in problem.base_params]
    if (meta_owned or any(base_owned)) and not all(base_owned):
        raise ValueError(
            'sync: "none" would perturb base_params along another v on each rank, but fully_shard puts parts of them'
            ' together, or averages the gradients of meta_params, over the ranks; pass sync="full"'
        )


def parts(
    params: Sequence[Tensor],
    meta_params: Sequence[Tensor],
    *,
    difference: str,
    clip_rank_one: bool,
    master_params: Any,
) -> None:
    """Raise where something was asked for that cannot be done on parts of parameters."""
    for name, tensors in (("base_params", params), ("meta_params", meta_params)):
        if any(map(is_offloaded, tensors)):
            raise NotImplementedError(
                f"{name}: fully_shard with CPUOffloadPolicy keeps them on the CPU, from where they may still be copied"
                " as theta moves; keep them on the GPU (the optimizer's state may be elsewhere)"
            )
    if not any(map(is_sharded, params)):
        return
    if difference == "exact":
        raise NotImplementedError(
            'difference: "exact" needs forward-mode derivatives through DTensors, which torch does not have; use'
            ' difference="central"'
        )
    if clip_rank_one:
        raise NotImplementedError("clip_rank_one: it is not available for sharded base_params; pass clip_coef alone")
    if master_params is not None:
        raise NotImplementedError(
            "master_params: not for sharded base_params; shard float32 parameters and let fully_shard compute in"
            " bfloat16 (MixedPrecisionPolicy)"
        )
