"""What `MetaTrainer` refuses, and the cure."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sama_kernels.meta_gradient import meta_grad

_OWN = {"base_loss", "meta_loss", "meta_params", "optimizer", "grad_scaler", "master_params"}
"""Arguments of `meta_grad` that the Trainer gives."""


def check_arguments(
    base_loss: Any, meta_model: Any, meta_optimizer: Any, meta_dataset: Any, meta_loss: Any, sizes: Mapping[str, Any]
) -> None:
    for name, loss in (("base_loss", base_loss), ("meta_loss", meta_loss)):
        if not callable(loss) and (name == "base_loss" or loss is not None):
            raise TypeError(f"{name}: expected a function (model, inputs) -> 0-dim tensor, got {type(loss).__name__}")
    if not isinstance(meta_model, nn.Module):
        raise TypeError(
            f"meta_model: expected an nn.Module, got {type(meta_model).__name__}; sk.nn.SampleWeights holds one weight"
            " per sample, and nn.ParameterList tensors of your own"
        )
    if not isinstance(meta_optimizer, torch.optim.Optimizer):
        raise TypeError(f"meta_optimizer: expected a torch.optim.Optimizer, got {type(meta_optimizer).__name__}")
    stepped = {id(p) for group in meta_optimizer.param_groups for p in group["params"]}
    if stepped != {id(p) for p in meta_model.parameters() if p.requires_grad}:
        raise ValueError("meta_optimizer: it must hold the parameters of meta_model that require grad, and no others")
    if not hasattr(meta_dataset, "__len__") or not hasattr(meta_dataset, "__getitem__"):
        raise TypeError(
            f"meta_dataset: expected a dataset with a length and samples by index, got {type(meta_dataset).__name__};"
            " put the clean samples of a stream into a list"
        )
    if len(meta_dataset) == 0:
        raise ValueError("meta_dataset: it is empty; the meta loss needs samples")
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name}: expected a positive integer, got {size!r}")


def check_sama(sama: Mapping[str, Any]) -> None:
    known = set(inspect.signature(meta_grad).parameters)
    if unknown := set(sama) - (known - _OWN):
        raise ValueError(
            f"sama: {', '.join(sorted(unknown))}: not among the arguments that may be given here,"
            f" {', '.join(sorted(known - _OWN))}"
        )


def check_parallelism(trainer: Any) -> None:
    if trainer.args.n_gpu > 1:
        raise NotImplementedError(
            "args: the Trainer would use nn.DataParallel, whose replicas hide theta; start one process per GPU with"
            " torchrun, or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    if trainer.is_deepspeed_enabled:
        raise NotImplementedError(
            "args: DeepSpeed is not supported; shard the model with fsdp (fsdp_version 2) instead"
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if any(getattr(parallelism, name, False) for name in ("cp_enabled", "sp_enabled")):
        raise NotImplementedError("args: context and sequence parallelism are not supported; use data parallelism")
