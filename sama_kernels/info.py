"""`info()`: what this installation is, and which backend each op would use here and why."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from sama_kernels import adaptation, backends
from sama_kernels.backends import cpu, cuda
from sama_kernels.version import __version__

_WHAT = {
    "cpu": "compiled CPU kernels (csrc/cpu)",
    "cuda": "compiled CUDA kernels (csrc/cuda)",
    "triton": "Triton kernels, compiled when first used",
    "reference": "plain PyTorch",
}
OPS = (
    "adapt_norm_adam", "adapt_norm_low_bit_adam", "adapt_norm_scale", "adapt_norm_moments", "step_size", "perturb",
    "restore", "central_difference",
)  # fmt: skip


def info() -> dict[str, Any]:
    """Version, build and backends as a plain dict (JSON-ready): keys `version`, `torch`, `build`, `optimizers`, `ops`.

    `build` has `cpu` and `cuda` (whether those kernels are part of the installation) and `cuda_arch_list` (the compute
    capabilities that the latter were compiled for). `ops` maps each op to `{"cpu": {"backend": ..., "why": ...}}`, plus
    "cuda" where a CUDA device is present.
    """
    archs = cuda.arch_list()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "version": __version__,
        "torch": torch.__version__,
        "build": {"cpu": cpu.missing() is None, "cuda": bool(archs), "cuda_arch_list": archs},
        "optimizers": adaptation.supported(),
        "ops": {op: {device: _choice(torch.device(device)) for device in devices} for op in OPS},
    }


def _choice(device: torch.device) -> dict[str, str]:
    """What `backend="auto"` is on a device, and what kept the backends that are preferred to it from being it."""
    backend = backends.resolve("auto", device)
    preferred = itertools.takewhile(lambda name: name != backend, backends.PREFERRED[device.type])
    passed_over = [f"{name}: {backends.unavailable(name, device)}" for name in preferred]
    return {"backend": backend, "why": "; not ".join([_WHAT[backend], *passed_over])}
