"""Which kernel runs: `resolve` chooses a backend once per meta step, `kernel` hands out its functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sama_kernels.backends import cpu, reference

NAMES = ("auto", "reference", "cpu", "cuda", "triton")


def unavailable(backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run on `device`; None if it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return cpu.missing() if device.type == "cpu" else f"it runs on CPU tensors, and these are on {device}"
    return "this release has no such kernels yet"


def resolve(backend: str, device: torch.device) -> str:
    """The backend to use for tensors on `device`.

    "auto" is the compiled one for the device type if this installation has it, else "reference".
    Raises:
        ValueError: unknown name. RuntimeError: the named backend is not there; it is never replaced by another one.
    """
    if backend not in NAMES:
        raise ValueError(f"backend: {backend!r} is none of {', '.join(map(repr, NAMES))}")
    if backend == "auto":
        return "cpu" if unavailable("cpu", device) is None else "reference"
    why = unavailable(backend, device)
    if why is not None:
        raise RuntimeError(f'backend: {backend!r} cannot be used: {why}. Use backend="auto" or "reference".')
    return backend


def kernel(op: str, backend: str) -> Callable[..., Any]:
    """The function that runs `op` on a backend that `resolve` returned."""
    if backend == "reference":
        return getattr(reference, op)  # type: ignore[no-any-return]
    return getattr(torch.ops.sama, op).default  # type: ignore[no-any-return]
