"""The Triton kernels against the reference: under the interpreter everywhere, compiled where there is a GPU.

TRITON_INTERPRET decides when a kernel is defined, so that one process can have kernels of one kind only: the tests are
in MODULES, and run in a process of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from op_cases import SEED
from triton_required import require_interpreter, require_triton

HERE = Path(__file__).parent
MODULES = ["triton_values.py", "triton_moments.py", "triton_low_bit.py", "triton_contract.py"]


def run(module: str, **environment: str) -> None:
    """Run the tests of a module; its report is the message if one of them fails or none runs."""
    without = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / module)]
    environment = {**without, "SAMA_TEST_SEED": str(SEED), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True)
    print(done.stdout[-20_000:], done.stderr[-5_000:])
    assert done.returncode == 0, done.stdout[-20_000:]
    assert re.search(r"\d+ passed", done.stdout.splitlines()[-1])


@pytest.mark.parametrize("module", MODULES)
def test_interpreted(module: str) -> None:
    require_interpreter()
    run(module, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.parametrize("module", MODULES)
def test_on_the_gpu(module: str) -> None:
    require_triton()
    run(module)
