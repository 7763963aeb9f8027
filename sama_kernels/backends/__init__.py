"""Which kernel runs: `resolve` chooses a backend once per meta step, `kernel` hands out its functions."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from sama_kernels.backends import cpu, cuda, reference, triton

NAMES = ("auto", "reference", "cpu", "cuda", "triton")

# What "auto" tries, in this order. CUDA C++ before Triton until a measurement on a GPU says otherwise.
PREFERRED = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run on `device`; None if it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return cpu.missing() if device.type == "cpu" else f"it runs on CPU tensors, and these are on {device}"
    if backend == "triton":
        interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        why_not = (
            None if device.type == "cuda" or interpreted else f"it runs on CUDA tensors, and these are on {device}"
        )
        return triton.missing() or why_not
    return cuda.missing() if device.type == "cuda" else f"it runs on CUDA tensors, and these are on {device}"


def resolve(backend: str, device: torch.device) -> str:
    """The backend to use for tensors on `device`.

    "auto" is the first of the fused ones for the device type that this installation has, else "reference".
    Raises:
        ValueError: unknown name. RuntimeError: the named backend is not there; it is never replaced by another one.
    """
    if backend not in NAMES:
        raise ValueError(f"backend: {backend!r} is none of {', '.join(map(repr, NAMES))}")
    if backend == "auto":
        candidates = PREFERRED.get(device.type, ())
        return next((name for name in candidates if unavailable(name, device) is None), "reference")
    why = unavailable(backend, device)
    if why is not None:
        raise RuntimeError(f'backend: {backend!r} cannot be used: {why}. Use backend="auto" or "reference".')
    return backend


def kernel(op: str, backend: str) -> Callable[..., Any]:
    """The function that runs `op` on a backend that `resolve` returned."""
    if backend == "reference":
        return getattr(reference, op)  # type: ignore[no-any-return]
    suffix = "_triton" if backend == "triton" else ""
    return getattr(torch.ops.sama, op + suffix).default  # type: ignore[no-any-return]
