"""Checks of the arguments of a meta step: each failure is one error that names the argument and the cure."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import tee
from typing import Any

import torch
from torch import Tensor, nn

from sama_kernels.distributed.sharded import is_freed, local
from sama_kernels.graphs import nodes_from
from sama_kernels.trees import parameters_of
from sama_kernels.types import Relative

ADAPTATIONS = ("paper", "exact", "none")
HOLDS = ("auto", "center")
ROUNDINGS = ("nearest", "stochastic")
DIFFERENCES = ("central", "forward", "exact")
_EXPECTED = "an nn.Module or an iterable of tensors and modules"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise unless `value` is one of the strings in `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is none of {', '.join(map(repr, allowed))}")


def integer(name: str, value: object) -> int:
    """Raise unless `value` is an int."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    return value


def closures(name: str, value: object) -> tuple[Callable[[], Tensor], ...]:
    """One closure, or a list of them (microbatches), as a tuple."""
    found = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not found or not all(callable(f) for f in found):
        raise TypeError(f"{name}: expected a function () -> scalar tensor (or a list of them), got {value!r}")
    return found


def reusable(value: Any) -> Any:
    """`value`, or a list of what it yields if it can be gone through only once (`module.parameters()`)."""
    return list(value) if isinstance(value, Iterator) else value


def twice(value: Any) -> tuple[Any, Any]:
    """`value` for two readers, like `reusable`, but not read yet: FSDP's modules may still have to be resharded."""
    if isinstance(value, Iterator):
        first, second = tee(value)
        return first, second
    return value, value


def tensors(name: str, value: Any, *, skip_frozen: bool) -> tuple[Tensor, ...]:
    """The tensors of a module, or of an iterable of tensors and modules, that require grad, without repetition.

    Of a module, parameters that do not require grad are left out. With `skip_frozen`, so are such tensors of an
    iterable, and modules without any other; otherwise they are errors.
    """
    if isinstance(value, Tensor | str) or not isinstance(value, nn.Module | Iterable):
        raise TypeError(f"{name}: expected {_EXPECTED}, got {type(value).__name__}")
    found: list[Tensor] = []
    for i, item in enumerate([value] if isinstance(value, nn.Module) else value):
        if isinstance(item, nn.Module):
            trained = [p for p in parameters_of(item) if p.requires_grad]
            if not (trained or skip_frozen or item is value):
                raise ValueError(
                    f"{name}: element {i} ({type(item).__name__}) has no parameter that requires grad; leave it out or"
                    " call requires_grad_()"
                )
            found += trained
        elif isinstance(item, Tensor):
            found.append(item)
        else:
            raise TypeError(
                f"{name}: element {i} is a {type(item).__name__}; expected {_EXPECTED} (of a dict, pass .values())"
            )
    found = list({id(t): t for t in found}.values())
    for i, t in enumerate(found):
        if _is_usual(t):
            continue
        if t.dtype not in _DTYPES:
            raise TypeError(f"{name}: tensor {i} is {t.dtype}; only float32, float64, bfloat16 and float16 can be used")
        if is_freed(t):
            raise ValueError(
                f"{name}: tensor {i} (shape {tuple(t.shape)}) is what fully_shard had gathered, and has no memory now;"
                " pass the module, or take its parameters when it is not gathered (after module.reshard())"
            )
        if t.layout != torch.strided:
            raise TypeError(f"{name}: tensor {i} has layout {t.layout}; only dense (strided) tensors can be used")
        if not (t.requires_grad or skip_frozen):
            raise ValueError(f"{name}: tensor {i} does not require grad; leave it out or call requires_grad_()")
    found = [t for t in found if t.requires_grad]
    if not found:
        raise ValueError(f"{name}: no tensor that requires grad in it")
    return tuple(found)


def _is_usual(t: Tensor) -> bool:
    """Whether there is nothing to be said against a tensor that will be trained: what most are, told fast."""
    strided = type(t) is nn.Parameter and t.layout == torch.strided
    return strided and t.requires_grad and t.dtype in _DTYPES and t.untyped_storage().size() > 0


def leaves(name: str, params: Sequence[Tensor]) -> None:
    """Raise unless every tensor is a leaf that owns its cells: it is moved in place."""
    for i, p in enumerate(params):
        if not p.is_leaf:
            raise ValueError(
                f"{name}: tensor {i} is not a leaf; pass the parameters themselves, not values made of them"
            )
        if not (type(p) is nn.Parameter and p.is_contiguous()) and torch._debug_has_internal_overlap(local(p)) == 1:
            raise ValueError(f"{name}: tensor {i} is expanded (several cells share memory); make it contiguous()")


def independent(meta_params: Sequence[Tensor]) -> None:
    """Raise if a meta parameter is computed from another one: its gradient would reach that one twice."""
    computed = [p for p in meta_params if p.grad_fn is not None]
    if not computed or len(meta_params) == 1:
        return
    row_of: dict[Any, int] = {p.grad_fn if p.grad_fn is not None else id(p): i for i, p in enumerate(meta_params)}
    sources = (f for p in computed if p.grad_fn is not None for f, _ in p.grad_fn.next_functions if f is not None)
    for node in nodes_from(sources):
        row = row_of.get(node, row_of.get(id(getattr(node, "variable", None))))
        if row is not None:
            raise ValueError(
                f"meta_params: another of these tensors is computed from tensor {row} (shape"
                f" {tuple(meta_params[row].shape)}), whose gradient would be counted twice; pass one of them:"
                " gradients of computed tensors reach what they come from in meta_backward"
            )


def disjoint(base_params: Sequence[Tensor], meta_params: Sequence[Tensor], given: Sequence[Any]) -> None:
    """Raise if a tensor is both a base and a meta parameter; modules in `given`, the two arguments, know its name."""
    both = {id(p) for p in base_params} & {id(p) for p in meta_params}
    if both:
        names = _names(given)
        shared = [names.get(id(p), f"tensor {i}") for i, p in enumerate(meta_params) if id(p) in both]
        more = f" and {len(shared) - 3} more" if len(shared) > 3 else ""
        raise ValueError(
            f"meta_params: {len(both)} of these tensors are base_params too ({', '.join(shared[:3])}{more}); pass"
            " base_params without them: [p for name, p in model.named_parameters() if name not in ...]"
        )


def _names(given: Sequence[Any]) -> dict[int, str]:
    """Names of parameters in quotes, as far as modules were given: base_params first: the whole model tells most."""
    modules: list[nn.Module] = []
    for value in given:
        items = [value] if isinstance(value, nn.Module) else value if isinstance(value, list | tuple) else []
        modules += [item for item in items if isinstance(item, nn.Module)]
    found: dict[int, str] = {}
    for module in modules:
        for name, p in module.named_parameters():
            found.setdefault(id(p), repr(name))
    return found


def no_graph_memory(device: torch.device) -> None:
    """Raise if torch.compile runs CUDA graphs on `device`: each run overwrites what the one before it returned, and
    gradients and held values have to outlive several."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if device.type == "cuda" and trees is not None and trees.get_manager(device.index, False) is not None:
        raise NotImplementedError(
            'base_loss, meta_loss: torch.compile with CUDA graphs (mode="reduce-overhead" or "max-autotune") overwrites'
            ' gradients that the meta step still needs; use mode="default" or "max-autotune-no-cudagraphs"'
        )


def one_device(base_params: Sequence[Tensor], meta_params: Sequence[Tensor]) -> torch.device:
    """The device of all parameters; raises if there are several."""
    devices = {p.device for p in (*base_params, *meta_params)}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"base_params, meta_params: all must be on one device, got {names}")
    return base_params[0].device


def length(name: str, value: Any) -> float | Relative:
    """`value` as a finite float > 0, or a `Relative`, which has been checked when it was made."""
    if isinstance(value, Relative):
        return value
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(
            f"{name}: expected a number or sama_kernels.relative(fraction), got {type(value).__name__} {value!r}"
        )
    return positive(name, value)


def positive(name: str, value: Any) -> float:
    """`value` as a finite float > 0."""
    if isinstance(value, Tensor) or not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: must be positive and finite, got {value}")
    return float(value)


def held_by(optimizer: Any, params: Sequence[Tensor], name: str = "base_params") -> None:
    """Raise unless `optimizer` is a torch optimizer that holds every tensor of `params`, the argument `name`."""
    if type(optimizer).__module__.partition(".")[0] == "deepspeed":
        raise TypeError(
            f"optimizer: {type(optimizer).__name__} keeps parameters, gradients and state in flat buffers of its own;"
            " DeepSpeed is not supported: shard the model with torch.distributed.fsdp.fully_shard, and give it an"
            " ordinary optimizer"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: expected the torch.optim.Optimizer that made the base step, got {type(optimizer).__name__};"
            " a wrapper must be opened (e.g. .optimizer)"
        )
    if isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: a {type(optimizer).__name__} is a wrapper; pass the optimizer inside it, which is its"
            " attribute .optimizer"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [i for i, p in enumerate(params) if id(p) not in held]
    if missing:
        raise ValueError(
            f"{name}: {len(missing)} of {len(params)} tensors are not held by the optimizer (the first is tensor"
            f" {missing[0]}, shape {tuple(params[missing[0]].shape)}); pass only what the optimizer trains, or freeze"
            " the rest with requires_grad_(False)"
        )


def masters(value: Any, base_params: Sequence[Tensor], update_base: bool) -> tuple[Tensor, ...] | None:
    """`master_params` as a tuple that matches `base_params` one by one; None if there are none."""
    if value is None:
        return None
    name = "master_params"
    if isinstance(value, Tensor) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected an iterable of tensors, got {type(value).__name__}")
    found = tuple(value)
    if len(found) != len(base_params):
        raise ValueError(
            f"{name}: {len(found)} tensors for {len(base_params)} base_params that require grad; pass one master copy"
            " for each, in their order"
        )
    for i, (master, p) in enumerate(zip(found, base_params, strict=True)):
        if not isinstance(master, Tensor):
            raise TypeError(f"{name}: element {i} is a {type(master).__name__}, not a tensor")
        if master.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: tensor {i} is {master.dtype}; master copies are float32 or float64")
        if master.shape != p.shape:
            raise ValueError(
                f"{name}: tensor {i} has shape {tuple(master.shape)}, but tensor {i} of base_params has shape"
                f" {tuple(p.shape)}; pass one master copy for each base parameter, in their order"
            )
        if master.device != p.device:
            raise ValueError(f"{name}: tensor {i} is on {master.device}, but its base parameter is on {p.device}")
    if update_base:
        raise ValueError(
            "update_base: with master_params the base parameters are overwritten by their master copies at the next"
            " step, so that the update would be lost; pass update_base=False"
        )
    return found
