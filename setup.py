"""Builds `sama_kernels._C`, the CPU kernels. Everything else about the package is in pyproject.toml.

SAMA_KERNELS_EXT=0    install without compiled kernels (the ops then run in plain PyTorch)
SAMA_KERNELS_CUDA     auto (default) or 0: CPU kernels only; 1 is refused, as this release has no CUDA sources
CXX, CXXFLAGS         as usual

The kernels use the stable ABI of libtorch and the limited API of Python: one binary runs with torch >= 2.11 and
Python >= 3.11. Only torch's headers and libtorch_cpu are needed, so torch is not even imported here.
"""

import importlib.metadata
import importlib.util
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TORCH_TARGET = (2, 11)
WITHOUT = "or set SAMA_KERNELS_EXT=0 to install without compiled kernels"


def choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default)
    if value not in allowed:
        raise SystemExit(f"sama_kernels: {name}={value!r} is none of {', '.join(allowed)}")
    return value


def torch_directory() -> Path:
    """Where torch is installed; a clear message if it is not, or is too old."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "sama_kernels: torch was not found where the kernels are built. Install it first, then build without"
            f" isolation:\n  pip install 'torch>=2.11' && pip install --no-build-isolation .\n{WITHOUT}."
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < TORCH_TARGET:
        raise SystemExit(f"sama_kernels: torch {version} is too old, 2.11 or newer is needed; upgrade it, {WITHOUT}.")
    return Path(next(iter(spec.submodule_search_locations)))


class BuildKernels(build_ext):
    """Checks for what is needed, adds torch's paths, compiles the sources in parallel."""

    def build_extension(self, ext: Any) -> None:
        torch = torch_directory()
        compiler = os.environ.get("CXX", "c++").split()[0]
        if os.name == "nt" or shutil.which(compiler) is None:
            raise SystemExit(
                f"sama_kernels: no C++ compiler ({compiler!r} is not in PATH). Install g++ 11 or newer (Debian, Ubuntu:"
                f" apt-get install g++), point CXX to one, {WITHOUT}."
            )
        ext.include_dirs.append(str(torch / "include"))
        ext.library_dirs.append(str(torch / "lib"))
        compile_one = self.compiler.compile

        def compile_all(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_one([source], **options), sources)
                return list(chain.from_iterable(objects))

        self.compiler.compile = compile_all
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_one


CPU_KERNELS = Extension(
    "sama_kernels._C",
    sources=sorted(glob("csrc/cpu/*.cpp")),
    depends=sorted(glob("csrc/**/*.h", recursive=True)),
    libraries=["torch_cpu"],
    define_macros=[
        ("TORCH_TARGET_VERSION", f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000ULL"),
        ("Py_LIMITED_API", "0x030B0000"),
    ],
    # No -ffast-math and no fused multiply-add: the results are the same bits on every instruction set, and NaN, Inf
    # and denormals keep their meaning. The two -fno flags only drop errno and floating-point traps, which would keep
    # sqrt and selects from being vectorised.
    extra_compile_args=[
        "-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
        "-ffp-contract=off", "-Wall", "-Wno-psabi",
    ],
    language="c++",
    py_limited_api=True,
)  # fmt: skip

if choice("SAMA_KERNELS_CUDA", "auto", ("auto", "0", "1")) == "1":
    raise SystemExit("sama_kernels: SAMA_KERNELS_CUDA=1, but this release has no CUDA kernels; use auto or 0.")
if choice("SAMA_KERNELS_EXT", "1", ("0", "1")) == "0":
    setup()
else:
    setup(
        ext_modules=[CPU_KERNELS],
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
