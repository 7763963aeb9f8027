"""Adam and AdamW with low-bit moments (torchao, bitsandbytes): dequantised one parameter at a time, then as Adam.

The step computes u from moments in float32 and stores them quantised. D is that of Adam at the stored moments, with
what is known exactly about them put right (`_moments`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sama_kernels import ops
from sama_kernels.adaptation.general import moved, scalar
from sama_kernels.adaptation.plan import Family, GroupStep, OpCall

Reader = Callable[[dict[str, Any]], tuple[Tensor, Tensor]]
"""A parameter's state -> m and w as float tensors of its shape."""


def torchao(step: GroupStep) -> list[OpCall]:
    """torchao's AdamW8bit, AdamW4bit, AdamWFp8; Adam8bit, Adam4bit, AdamFp8 without decay; block size as it comes."""
    coupled = step.hyper["weight_decay"] != 0 and not step.optimizer.is_adamw  # type: ignore[attr-defined]
    if coupled:
        _refuse("weight_decay of torchao's Adam", "it needs theta before the step", "use AdamW8bit")
    if step.hyper["amsgrad"]:
        _refuse("amsgrad of torchao", "maxima that are quantised apart cannot be compared", "use amsgrad=False")
    return _calls(step, _torchao_moments)


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
    used = [i for i in moved(step) if step.optimizer.state.get(step.params[i])]
    h = step.hyper
    beta1, beta2, *_ = h["betas"]
    lists: tuple[list[Any], ...] = (
        [step.gradient(i) for i in used],
        [step.optimizer.state[step.params[i]] for i in used],
    )
    options = {"read": read, "lr": h["lr"], "beta1": beta1, "beta2": beta2, "eps": h["eps"], "mode": step.mode}
    return [OpCall(adapt_norm_low_bit_adam, [step.rows[i] for i in used], lists, options)] if used else []


def adapt_norm_low_bit_adam(
    v: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    *,
    read: Reader,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    mode: int,
    backend: str,
) -> Tensor:
    """`ops.adapt_norm_adam` parameter by parameter; memory beyond v: the moments of one parameter."""
    norm_sqs = []
    for d, grad, state in zip(v, grads, states, strict=True):
        t = state["step"] if isinstance(state["step"], Tensor) else torch.tensor(float(state["step"]))
        m, w = _moments(read(state), grad.detach(), scalar(t, grad) == 1, beta1, beta2)
        norm_sq = ops.adapt_norm_adam(
            [d], [grad], [m], [w], [], [], [t],
            lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=0.0, maximize=False, mode=mode, backend=backend,
        )  # fmt: skip
        norm_sqs.append(norm_sq)
        del m, w  # before the next ones
    return torch.stack(norm_sqs).sum()


def _moments(
    stored: tuple[Tensor, Tensor], grad: Tensor, first: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """m and w of the step: at the first one they are known exactly; later w was no smaller than the term that this
    step added, and a stored w below it (often 0, where one cell of a block is far larger) is quantisation error."""
    g = grad.to(torch.float64 if grad.dtype == torch.float64 else torch.float32)
    added = (1 - beta2) * g.square()
    m, w = (x.to(g.dtype) for x in stored)
    return torch.where(first, (1 - beta1) * g, m), torch.where(first, added, torch.maximum(w, added))


def _torchao_moments(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    m, w = (x if type(x) is Tensor else x.dequantize() for x in (state["exp_avg"], state["exp_avg_sq"]))
    return m, w


def _bitsandbytes_moments(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return _blockwise(state, 1), _blockwise(state, 2)


def _blockwise(state: dict[str, Any], which: int) -> Tensor:
    codes: Tensor = state[f"state{which}"]
    if codes.dtype != torch.uint8:
        return codes
    dequantize = sys.modules["bitsandbytes.functional"].dequantize_blockwise
    values: Tensor = dequantize(codes, absmax=state[f"absmax{which}"], code=state[f"qmap{which}"], blocksize=256)
    return values


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
