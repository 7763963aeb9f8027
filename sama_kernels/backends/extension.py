"""Loading a compiled extension: importing it registers its kernels for the `sama::*` ops."""

from __future__ import annotations

import importlib
import importlib.util


def load(name: str) -> bool:
    """Import `sama_kernels.<name>`; False if this installation does not have it.

    Raises:
        ImportError: it is there, but does not load; slow code is not run quietly instead.
    """
    module = f"sama_kernels.{name}"
    if importlib.util.find_spec(module) is None:
        return False
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"sama_kernels: the compiled extension {name} is installed but does not load ({error}). It needs the torch"
            " it was built for or a newer one (>= 2.11): reinstall with `pip install --no-build-isolation"
            " --force-reinstall sama_kernels`, or with SAMA_KERNELS_EXT=0 for pure Python."
        ) from error
    return True
