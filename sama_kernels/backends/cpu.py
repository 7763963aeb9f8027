"""The compiled CPU kernels (csrc/cpu): importing `_C` registers them for the CPU key of the `sama::*` ops."""

from __future__ import annotations

from sama_kernels.backends import extension

_LOADED = extension.load("_C")


def missing() -> str | None:
    """Why the compiled CPU kernels are not there; None if they are."""
    if _LOADED:
        return None
    return "the compiled extension is not part of this installation (SAMA_KERNELS_EXT=0 when it was installed?)"
