"""The compiled CPU kernels (csrc/cpu): importing `_C` registers them for the CPU key of the `sama::*` ops."""

from __future__ import annotations

import importlib
import importlib.util

_NAME = "sama_kernels._C"

if importlib.util.find_spec(_NAME) is not None:
    try:
        importlib.import_module(_NAME)
    except ImportError as error:  # built, but not loadable here: say so instead of running slow code quietly
        raise ImportError(
            f"sama_kernels: the compiled extension is installed but does not load ({error}). It needs the torch it was"
            " built for or a newer one (>= 2.11): reinstall with `pip install --no-build-isolation --force-reinstall"
            " sama_kernels`, or with SAMA_KERNELS_EXT=0 for pure Python."
        ) from error
    _LOADED = True
else:
    _LOADED = False


def missing() -> str | None:
    """Why the compiled CPU kernels are not there; None if they are."""
    if _LOADED:
        return None
    return "the compiled extension is not part of this installation (SAMA_KERNELS_EXT=0 when it was installed?)"
