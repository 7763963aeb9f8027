"""Builds csrc/cuda for the CPU and registers it as `sama_emulated::*`, so that its kernels run where no GPU is.

The sources are compiled unchanged, as C++; `cuda_emulation.h` stands in for csrc/cuda/runtime.h. What this shows is
indexing and arithmetic: which element is read and written by which thread, barriers, heads and tails, tables that
overflow, sums; and that launches which are captured and replayed find their numbers in memory. It shows nothing about
memory ordering between threads, about streams and devices, or about speed; tests marked `gpu` do.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import sama_kernels.ops  # noqa: F401  (defines the schemas)

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
OPS = (
    "adapt_norm_adam", "adapt_norm_low_bit_adam", "adapt_norm_scale", "adapt_norm_moments", "step_size", "perturb",
    "restore", "central_difference",
)  # fmt: skip
REPLACED = ("stream.cpp", "module.cpp")  # torch's current stream and the Python module

COMPILER = shutil.which("c++")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1"]  # see tests/sanitize.sh


@functools.cache
def library() -> ctypes.CDLL:
    """The emulated kernels, compiled once per process; their ops are `torch.ops.sama_emulated`."""
    with tempfile.TemporaryDirectory() as folder:
        path = _compile(Path(folder))
        definitions = torch.library.Library("sama_emulated", "DEF")
        for name in OPS:
            definitions.define(str(getattr(torch.ops.sama, name).default._schema).removeprefix("sama::"))
        torch.ops.load_library(str(path))
        loaded = ctypes.CDLL(str(path))
    loaded.emulation_launches.restype = ctypes.c_int64
    loaded.emulation_store_bytes.restype = loaded.emulation_store_sectors.restype = ctypes.c_int64
    loaded.emulation_end_capture.restype = ctypes.c_void_p
    loaded.definitions = definitions  # type: ignore[attr-defined]  # the ops live as long as this object
    return loaded


@contextmanager
def scalars_on_device() -> Iterator[None]:
    """Step counters and learning rates count as lying on the device: the kernels read them."""
    library().emulation_put_scalars_on_host(ctypes.c_bool(False))
    try:
        yield
    finally:
        library().emulation_put_scalars_on_host(ctypes.c_bool(True))


def captured(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """What `function` returned while its launches were captured instead of made, and what replays them."""
    library().emulation_begin_capture()
    try:
        result = function()
    finally:
        graph = ctypes.c_void_p(library().emulation_end_capture())
    return result, lambda: library().emulation_replay(graph)


@contextmanager
def backwards() -> Iterator[None]:
    """Blocks and threads run in the opposite order, which must not change a result."""
    library().emulation_run_backwards(ctypes.c_bool(True))
    try:
        yield
    finally:
        library().emulation_run_backwards(ctypes.c_bool(False))


def stored(function: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that the kernels of `function` store 16 at a time, and 32-byte sectors that a warp's instructions touch."""
    library().emulation_count_stores(ctypes.c_bool(True))
    try:
        function()
        return library().emulation_store_bytes(), library().emulation_store_sectors()
    finally:
        library().emulation_count_stores(ctypes.c_bool(False))


def _compile(folder: Path) -> Path:
    torch_path = Path(torch.__file__).parent
    sanitize = SANITIZE if "SAMA_TEST_SANITIZED" in os.environ else []
    flags = [
        "-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
        "-fno-trapping-math", "-U_FORTIFY_SOURCE", "-Wno-psabi", "-DSAMA_EMULATION",
        "-DTORCH_TARGET_VERSION=0x020b000000000000ULL", f"-I{torch_path / 'include'}",
        f"-I{HERE}", f"-I{CSRC / 'common'}", f"-I{sysconfig.get_path('include')}", "-DPy_LIMITED_API=0x030B0000",
        *sanitize,
    ]  # fmt: skip
    sources = [
        source
        for directory in (CSRC / "common", CSRC / "cuda", HERE)
        for source in sorted(directory.iterdir())
        if source.suffix in (".cpp", ".cu") and source.name not in REPLACED
    ]

    def compile_one(source: Path) -> str:
        result = folder / f"{source.name}.o"
        subprocess.run([COMPILER, *flags, "-x", "c++", "-c", source, "-o", result], check=True)
        return str(result)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    path = folder / "emulated.so"
    link = ["-shared", *sanitize, *objects, "-o", path, f"-L{torch_path / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([COMPILER, *link], check=True)
    return path
