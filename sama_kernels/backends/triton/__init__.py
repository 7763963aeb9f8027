"""The Triton kernels: one file per op, imported when the first of them runs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

_FILES = {
    "adapt_norm_adam": "adapt_norm",
    "adapt_norm_scale": "adapt_norm",
    "adapt_norm_low_bit_adam": "adapt_norm_low_bit",
}


def missing() -> str | None:
    """Why the Triton kernels cannot be used; None if they can."""
    return None if importlib.util.find_spec("triton") is not None else "the package triton is not installed"


def kernel(op: str) -> Callable[..., Any]:
    """The Triton implementation of `sama::<op>`, same arguments."""
    module = importlib.import_module(f"sama_kernels.backends.triton.{_FILES.get(op, op)}")
    return getattr(module, op)  # type: ignore[no-any-return]
