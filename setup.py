"""Builds the compiled kernels: `sama_kernels._C` (CPU) and, where there is an nvcc, `sama_kernels._C_cuda`.

Everything else about the package is in pyproject.toml.

SAMA_KERNELS_EXT=0    install without compiled kernels (the ops then run in plain PyTorch, or in Triton on a GPU)
SAMA_KERNELS_CUDA     auto (default): CUDA kernels if an nvcc >= 12.8 is found; 1: an error if there is none; 0: never
SAMA_KERNELS_SPILLS   warn (default) or error: what a CUDA kernel that spills registers is
TORCH_CUDA_ARCH_LIST  the GPUs to compile for, as torch spells them; "8.0;9.0;10.0+PTX" if unset. No GPU is asked.
CUDA_HOME, CUDA_PATH  where the CUDA toolkit is, if `nvcc` is not in PATH
CXX, CXXFLAGS         as usual

The kernels use the stable ABI of libtorch and the limited API of Python: one binary runs with torch >= 2.11 and
Python >= 3.11. Only torch's headers and libtorch_cpu are needed, so torch is not even imported here, and the CUDA
kernels compile where torch itself has no CUDA.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TORCH_TARGET = (2, 11)
OLDEST_NVCC = (12, 8)  # the first that knows compute capability 10.0
DEFAULT_ARCHS = "8.0;9.0;10.0+PTX"
NAMED_ARCHS = {
    "volta": "7.0+PTX", "turing": "7.5+PTX", "ampere": "8.0;8.6+PTX", "ada": "8.9+PTX", "hopper": "9.0+PTX",
    "blackwell": "10.0;10.3;12.0+PTX",
}  # fmt: skip
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


@dataclass
class Nvcc:
    """A CUDA compiler and where its static runtime library is."""

    path: str
    version: tuple[int, ...]
    libraries: Path | None

    @classmethod
    def at(cls, path: str) -> "Nvcc":
        found = re.search(r"release (\d+)\.(\d+)", _output(path, "--version"))
        version = tuple(map(int, found.groups())) if found else (0,)
        # `path` may be a wrapper script: the compiler itself knows where its toolkit is.
        top = re.search(r"^#\$ TOP=(.+)$", _output(path, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
        root = Path(top[1].strip()) if top else Path(path).resolve().parents[1]
        places = [root / "lib64", root / "lib", *sorted(root.glob("targets/*/lib"))]
        return cls(path, version, next((p for p in places if (p / "libcudart_static.a").exists()), None))

    def fault(self) -> str | None:
        """Why the kernels cannot be built with it; None if they can."""
        if self.version < OLDEST_NVCC:
            return f"{self.path} is of CUDA {'.'.join(map(str, self.version))}"
        return None if self.libraries else f"the toolkit of {self.path} has no libcudart_static.a"


def _output(*command: str) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return result.stdout


def find_nvcc() -> tuple[Nvcc | None, str]:
    """The first nvcc that will do, and what is wrong with those before it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [shutil.which("nvcc", path=f"{home}/bin") for home in homes if home]
    candidates += [shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]
    faults = []
    for path in dict.fromkeys(filter(None, candidates)):
        nvcc = Nvcc.at(path)
        fault = nvcc.fault()
        if fault is None:
            return nvcc, ""
        faults.append(fault)
    return None, "; ".join(faults) or "no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"


def cuda_archs() -> list[str]:
    """TORCH_CUDA_ARCH_LIST as a list of "9.0", "9.0a" or "10.0+PTX"."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    archs: list[str] = []
    for word in re.split(r"[;,\s]+", wanted.strip(";, ")):
        archs += NAMED_ARCHS.get(word.removesuffix("+PTX").lower(), word).split(";")
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch) or float(arch.split("+")[0].rstrip("af")) < 7.0:
            raise SystemExit(
                f"sama_kernels: TORCH_CUDA_ARCH_LIST={wanted!r}: {arch!r} is no compute capability from 7.0 on."
                f" Write numbers such as {DEFAULT_ARCHS!r}, or names such as 'Hopper'."
            )
    return list(dict.fromkeys(archs))


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


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
        compile_each = compile_with_nvcc if ext.name == CUDA_NAME else compile_one

        def compile_all(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_each([source], **options), sources)
                return list(chain.from_iterable(objects))

        self.compiler.compile = compile_all
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_one


def compile_with_nvcc(
    sources: list[str], *, output_dir: str, macros: Any, include_dirs: list[str], extra_postargs: list[str], **_: Any
) -> list[str]:
    """What a compiler's `compile` does, for .cu and .cpp: nvcc hands the latter to the host compiler."""
    (source,) = sources
    target = Path(output_dir, source).with_suffix(".o")
    target.parent.mkdir(parents=True, exist_ok=True)
    assert NVCC is not None
    command = [NVCC.path, *extra_postargs, *(f"-D{name}={value}" if value else f"-D{name}" for name, value in macros)]
    folders = [*include_dirs, sysconfig.get_path("include")]
    # System headers: nvcc would warn about torch's.
    command += [*(f"-isystem={folder}" for folder in folders), "-c", source, "-o", str(target)]
    if "CXX" in os.environ:
        command += ["-ccbin", os.environ["CXX"].split()[0]]
    if subprocess.run(command).returncode != 0:
        raise SystemExit(
            f"sama_kernels: {source} does not compile with {NVCC.path} (message above); SAMA_KERNELS_CUDA=0 installs"
            " without the CUDA kernels."
        )
    return [str(target)]


MACROS = [
    ("TORCH_TARGET_VERSION", f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000ULL"),
    ("Py_LIMITED_API", "0x030B0000"),
]
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))
COMMON = sorted(glob("csrc/common/*.cpp"))

CPU_KERNELS = Extension(
    "sama_kernels._C",
    sources=COMMON + sorted(glob("csrc/cpu/*.cpp")),
    depends=HEADERS,
    libraries=["torch_cpu"],
    define_macros=MACROS,
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

CUDA_NAME = "sama_kernels._C_cuda"
NVCC: Nvcc | None = None


def cuda_kernels(nvcc: Nvcc) -> Extension:
    archs = cuda_archs()
    strict = ",-Werror" if choice("SAMA_KERNELS_SPILLS", "warn", ("warn", "error")) == "error" else ""
    return Extension(
        CUDA_NAME,
        sources=COMMON + sorted(glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu")),
        depends=HEADERS,
        library_dirs=[str(nvcc.libraries)],
        # The runtime is linked in and hidden, so that it does not matter which one torch has; torch's own CUDA library
        # is found when a kernel is first launched.
        libraries=["torch_cpu", "cudart_static", "dl", "pthread", "rt"],
        extra_link_args=["-Wl,--exclude-libs,ALL"],
        define_macros=[*MACROS, ("USE_CUDA", ""), ("SAMA_CUDA_ARCH_LIST", '"' + ";".join(archs) + '"')],
        # As for the CPU: no --use_fast_math, no fused multiply-add, the same bits. That no kernel spills registers or
        # needs a stack has been seen with one nvcc and the default architectures: elsewhere it is a warning.
        extra_compile_args=[
            "-std=c++17", "-O3", "--threads=4", "--fmad=false", "-Xptxas=-warn-spills,-warn-lmem-usage" + strict,
            "-Xcompiler=-fPIC,-g0,-fvisibility=hidden,-ffp-contract=off,-Wall,-Wno-psabi", *gencode(archs),
        ],
        language="c++",
        py_limited_api=True,
    )  # fmt: skip


def extensions() -> list[Extension]:
    global NVCC
    with_cuda = choice("SAMA_KERNELS_CUDA", "auto", ("auto", "0", "1"))
    if choice("SAMA_KERNELS_EXT", "1", ("0", "1")) == "0":
        return []
    if with_cuda == "0":
        return [CPU_KERNELS]
    NVCC, fault = find_nvcc()
    if NVCC is not None:
        return [CPU_KERNELS, cuda_kernels(NVCC)]
    if with_cuda == "1":
        raise SystemExit(
            f"sama_kernels: SAMA_KERNELS_CUDA=1, but {fault}. The CUDA kernels need a CUDA toolkit of"
            f" {'.'.join(map(str, OLDEST_NVCC))} or newer: install one and point CUDA_HOME to it, or set"
            " SAMA_KERNELS_CUDA=0 to install without them."
        )
    print(f"sama_kernels: without CUDA kernels, because {fault}", file=sys.stderr)
    return [CPU_KERNELS]


found = extensions()
if not found:
    setup()
else:
    setup(
        ext_modules=found,
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
