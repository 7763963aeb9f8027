"""Whether the tests of the Triton backend can run here; where SAMA_TEST_REQUIRE names triton, they have to."""

from __future__ import annotations

import importlib.util
import os

import pytest

REQUIRED = "triton" in os.environ.get("SAMA_TEST_REQUIRE", "").split(",")


def _missing(reason: str) -> None:
    if REQUIRED:
        pytest.fail(f"SAMA_TEST_REQUIRE names triton, but {reason}", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def require_triton() -> None:
    """Skip the calling test, or the module that is being imported, if triton is not installed; or fail."""
    if importlib.util.find_spec("triton") is None:
        _missing("triton is not installed (pip install triton)")


def require_interpreter() -> None:
    """Triton, and a NumPy that its interpreter works with."""
    require_triton()
    import numpy
    import triton

    version = tuple(int(part) for part in numpy.__version__.split(".")[:2])
    if version >= (2, 4) and triton.__version__.startswith(("3.4.", "3.5.", "3.6.")):
        _missing(f"the interpreter of triton {triton.__version__} fails with numpy {numpy.__version__}, it needs < 2.4")
