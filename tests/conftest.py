"""Settings of every test run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import sama_kernels

# Under tests/sanitize.sh: it would prove nothing to test the kernels of an ordinary installation.
assert sama_kernels.__file__.startswith(os.environ.get("SAMA_TEST_SANITIZED", "/"))

# The tensors are tiny: more threads only wait for each other (the op tests take 9 s with one thread on a busy 2-core
# machine, 133 s with two). Tests that are about threads set their own number.
torch.set_num_threads(1)


# Files of few and long tests come first, so that no process waits for another one's at the end.
FIRST = ("test_triton_kernels.py", "test_noisy_finetuning_methods.py", "test_bench_scaling.py", "test_cuda_build.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` files without such tests are not even imported: they need packages that a GPU machine may lack."""
    if config.getoption("markexpr") != "gpu" or not collection_path.name.startswith("test_"):
        return None
    return not _has_gpu_tests(collection_path) or None


def _has_gpu_tests(path: Path) -> bool:
    text = path.read_text()
    return "mark.gpu" in text or "place_fixture" in text  # the latter's places are an emulation and a GPU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; skip what needs a GPU where there is none; SAMA_TEST_SHARD=2/4: every fourth from the second."""
    items.sort(key=lambda item: item.path.name not in FIRST)
    hidden = {item.path.name for item in items if "gpu" in item.keywords and not _has_gpu_tests(item.path)}
    assert not hidden, f"{hidden}: `pytest -m gpu` would leave these files out"
    if shard := os.environ.get("SAMA_TEST_SHARD"):
        first, step = map(int, shard.split("/"))
        items[:] = items[first - 1 :: step]
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
