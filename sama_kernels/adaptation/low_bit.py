"""Adam and AdamW with low-bit moments (torchao, bitsandbytes), which the op dequantises where it uses them.

The step computes u from moments in float32 and stores them quantised in blocks. D is that of Adam at the stored
moments, with what is known exactly about them put right (`ops.adapt_norm_low_bit_adam`). Parameters that are too small
for that keep moments as torch's Adam does, which `ops.adapt_norm_adam` takes as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sama_kernels import ops
from sama_kernels.adaptation.general import moved
from sama_kernels.adaptation.plan import Family, GroupStep, OpCall
from sama_kernels.distributed.sharded import local


@dataclass(frozen=True)
class Stored:
    """A moment of one parameter: value i is table[code i] * scales[i // block_size] (`ops.adapt_norm_low_bit_adam`)."""

    codes: Tensor
    scales: Tensor
    table: Tensor
    block_size: int


Moment = Tensor | Stored
Reader = Callable[[dict[str, Any]], tuple[Moment, Moment]]
"""A parameter's state -> m and w; both are quantised, or neither is."""


def torchao(step: GroupStep) -> list[OpCall]:
    """torchao's AdamW8bit, AdamW4bit, AdamWFp8; Adam8bit, Adam4bit, AdamFp8 without decay; block size as it comes."""
    coupled = step.hyper["weight_decay"] != 0 and not step.optimizer.is_adamw  # type: ignore[attr-defined]
    if coupled:
        _refuse("weight_decay of torchao's Adam", "it needs theta before the step", "use AdamW8bit")
    if step.hyper["amsgrad"]:
        _refuse("amsgrad of torchao", "maxima that are quantised apart cannot be compared", "use amsgrad=False")
    return _calls(step, partial(_torchao_moments, {}))


def bitsandbytes(step: GroupStep) -> list[OpCall]:
    """bitsandbytes' Adam and AdamW, with 8-bit or 32-bit moments; their weight decay is decoupled in both."""
    optimizer: Any = step.optimizer
    if optimizer.args.max_unorm > 0 or optimizer.args.skip_zeros:
        _refuse("max_unorm and skip_zeros of bitsandbytes", "they change the update", "leave them at 0 and False")
    manager = optimizer.mng
    configs = [manager.pid2config.get(id(p), {}) for p in step.params] + list(manager.index2config.values())
    overridden = {key for config in configs for key in config}
    if overridden - {"optim_bits", "min_8bit_size"}:
        _refuse(
            f"GlobalOptimManager overrides of {', '.join(sorted(overridden))}",
            "D reads the hyperparameters of the group",
            "use parameter groups",
        )
    return _calls(step, _bitsandbytes_moments)


def paged(step: GroupStep) -> list[OpCall]:
    """bitsandbytes' paged optimizers: refused."""
    name = type(step.optimizer).__name__
    _refuse(f"bitsandbytes' {name}", "its state is in paged memory", f"use {name.removeprefix('Paged')}")
    return []


def _refuse(what: str, why: str, cure: str) -> None:
    raise TypeError(f'optimizer: {what} has no adaptation: {why}; {cure}, or pass adaptation="none"')


def _calls(step: GroupStep, read: Reader) -> list[OpCall]:
    """One call for the parameters with quantised moments (per block size; there is one), one for the others."""
    state = step.optimizer.state
    calls: dict[int, list[int]] = {}
    moments = {i: read(local(state[step.params[i]])) for i in moved(step) if state.get(step.params[i])}
    for i, (m, _) in moments.items():
        calls.setdefault(m.block_size if isinstance(m, Stored) else 0, []).append(i)
    counters = _counters([state[step.params[i]]["step"] for i in moments])
    counter_of = dict(zip(moments, counters, strict=True))
    return [
        _call(step, block_size, used, [moments[i] for i in used], [counter_of[i] for i in used])
        for block_size, used in calls.items()
    ]


def _call(
    step: GroupStep, block_size: int, used: list[int], moments: list[tuple[Any, Any]], counters: list[Tensor]
) -> OpCall:
    h = step.hyper
    beta1, beta2, *_ = h["betas"]
    options = {"lr": h["lr"], "beta1": float(beta1), "beta2": float(beta2), "eps": float(h["eps"]), "mode": step.mode}
    grads = [step.gradient(i) for i in used]
    rows = [step.rows[i] for i in used]
    if block_size:
        stored = [[getattr(x[k], part) for x in moments] for k in (0, 1) for part in ("codes", "scales", "table")]
        lists = (grads, *stored, counters)
        return OpCall(ops.adapt_norm_low_bit_adam, rows, lists, {**options, "block_size": block_size})
    exact: tuple[list[Tensor], ...] = (grads, [m for m, _ in moments], [w for _, w in moments], [], [], counters)
    return OpCall(ops.adapt_norm_adam, rows, exact, {**options, "weight_decay": 0.0, "maximize": False})


def _counters(steps: list[Any]) -> list[Tensor]:
    """torchao's are tensors; bitsandbytes' are ints, nearly always the same one."""
    known = {t: torch.tensor(float(t), device="cpu") for t in {t for t in steps if not isinstance(t, Tensor)}}
    return [t if isinstance(t, Tensor) else known[t] for t in steps]


Tables = dict[tuple[torch.dtype, torch.device], Tensor]
"""Of this meta step: the next one may run on another stream, or this one belong to a CUDA graph."""


def _torchao_moments(tables: Tables, state: dict[str, Any]) -> tuple[Moment, Moment]:
    m, w = (_torchao_moment(state[key], tables) for key in ("exp_avg", "exp_avg_sq"))
    return m, w


def _torchao_moment(x: Any, tables: Tables) -> Moment:
    if type(x) is Tensor:
        return x
    if x.codes.is_floating_point():
        key = x.codes.dtype, x.codes.device
        if key not in tables:
            tables[key] = _all_values(*key)
        return Stored(x.codes.view(torch.uint8), x.scale, tables[key], x.block_size)
    return Stored(x.codes, x.scale, x.qmap, x.block_size)


def _all_values(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers of an 8-bit float dtype in the order of their bits, as a lookup table."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(dtype).float()


def _bitsandbytes_moments(state: dict[str, Any]) -> tuple[Moment, Moment]:
    return _bitsandbytes_moment(state, 1), _bitsandbytes_moment(state, 2)


def _bitsandbytes_moment(state: dict[str, Any], which: int) -> Moment:
    codes: Tensor = state[f"state{which}"]
    if codes.dtype != torch.uint8:
        return codes
    if not codes.is_contiguous():
        _refuse(
            "bitsandbytes' blocks of a parameter that is not row-major", "they follow its memory", "use contiguous()"
        )
    return Stored(codes, state[f"absmax{which}"], state[f"qmap{which}"], block_size=256)


FAMILIES: dict[str, Family] = {
    **{f"torchao.optim.adam.Adam{w}{bits}": torchao for w in ("", "W") for bits in ("8bit", "4bit", "Fp8")},
    **{
        f"bitsandbytes.optim.{module}.{name}{bits}": bitsandbytes
        for module, name in (("adam", "Adam"), ("adamw", "AdamW"))
        for bits in ("", "8bit", "32bit")
    },
    **{
        f"bitsandbytes.optim.{module}.Paged{name}{bits}": paged
        for module, name in (("adam", "Adam"), ("adamw", "AdamW"))
        for bits in ("", "8bit", "32bit")
    },
}
"""By module and name of the optimizer type: the packages need not be installed."""
