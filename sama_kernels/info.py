"""`info()`: what this installation is, and which backend each op would use here and why."""

from __future__ import annotations

from typing import Any

import torch

from sama_kernels import adaptation, backends
from sama_kernels.backends import cpu
from sama_kernels.version import __version__

OPS = ("adapt_norm_adam", "adapt_norm_scale", "step_size", "perturb", "restore", "central_difference")


def info() -> dict[str, Any]:
    """Version, build and backends as a plain dict (JSON-ready): keys `version`, `torch`, `build`, `optimizers`, `ops`.

    `ops` maps each op to `{"cpu": {"backend": ..., "why": ...}}`, plus "cuda" where a CUDA device is present.
    """
    why_not = cpu.missing()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "version": __version__,
        "torch": torch.__version__,
        "build": {"cpu": why_not is None, "cuda": False, "cuda_arch_list": []},
        "optimizers": adaptation.supported(),
        "ops": {op: {device: _choice(torch.device(device), why_not) for device in devices} for op in OPS},
    }


def _choice(device: torch.device, why_not: str | None) -> dict[str, str]:
    backend = backends.resolve("auto", device)
    if backend == "cpu":
        return {"backend": backend, "why": "compiled CPU kernels (csrc/cpu)"}
    reason = why_not if device.type == "cpu" else "this release has compiled kernels for CPU tensors only"
    return {"backend": backend, "why": f"plain PyTorch, because {reason}"}
