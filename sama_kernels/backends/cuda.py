"""The CUDA C++ kernels (csrc/cuda): importing `_C_cuda` registers them for the CUDA key of the `sama::*` ops."""

from __future__ import annotations

import importlib

import torch

from sama_kernels.backends import extension

# Without asking for a GPU, which would start CUDA: after that a process must not fork. It loads with any torch.
_LOADED = extension.load("_C_cuda")


def missing() -> str | None:
    """Why the CUDA kernels are not there; None if they are."""
    if _LOADED:
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return "the extension _C_cuda is not part of this installation (no nvcc when it was installed?)"


def arch_list() -> list[str]:
    """The compute capabilities that `_C_cuda` was compiled for; empty if this installation does not have it.

    Needs no GPU: the extension loads with any torch, and looks for CUDA only when a kernel is launched.
    """
    if not extension.load("_C_cuda"):
        return []
    listed: str = importlib.import_module("sama_kernels._C_cuda").ARCH_LIST
    return listed.split(";")
