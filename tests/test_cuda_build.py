"""nvcc compiles every CUDA kernel for every architecture without a spill or a stack frame; no GPU is needed for that.

Without nvcc these tests are skipped, unless SAMA_TEST_REQUIRE contains "nvcc".
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import sama_kernels as sk
from sama_kernels import backends

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

# How often each kernel is instantiated, and how many registers it may take with arithmetic in float32 and in float64.
# Kernels are bound by memory: what counts is bytes under way. A multiprocessor of these GPUs has 65,536 registers, so
# 80 of them allow three blocks of 256 threads, each thread with a pack of every operand under way: 96 KiB for the four
# operands of adapt_norm_adam in float32 (on sm_80 and sm_90); with 128, two blocks and 96 KiB for its six. float64 may
# take more: its packs are larger, too.
KERNELS = {
    "adam_kernel": (16, 128, 248),
    "low_bit_adam_kernel": (8, 80, 168),
    "scale_kernel": (2, 64, 80),
    "moments_kernel": (26, 128, 248),
    "plus_kernel": (4, 80, 120),
    "minus_kernel": (2, 64, 80),
    "restore_kernel": (1, 40, 0),
    "difference_kernel": (4, 96, 128),
    "slot_sum_kernel": (1, 0, 48),
    "bias_corrections_kernel": (1, 0, 48),
    "step_size_kernel": (1, 0, 48),
}


def required() -> bool:
    return "nvcc" in os.environ.get("SAMA_TEST_REQUIRE", "")


def unless_required(reason: str) -> None:
    """Skip, or fail where nvcc is said to be there."""
    if required():
        pytest.fail(f"SAMA_TEST_REQUIRE asks for nvcc, but {reason}")
    pytest.skip(reason)


@dataclass
class Compiler:
    """nvcc and the options that setup.py gives it."""

    path: str
    options: list[str]

    def run(self, source: Path, architecture: str, target: Path, *more: str) -> subprocess.CompletedProcess[str]:
        options = [option for option in self.options if not option.startswith(("-gencode", "--threads"))]
        command = [self.path, *options, *more, "-Xptxas=-v", f"-arch={architecture}", "-cubin", source, "-o", target]
        return subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    script = (
        "import json, runpy, sys\n"
        "sys.argv = ['setup.py', '--quiet', '--version']\n"
        "names = runpy.run_path('setup.py')\n"
        "nvcc = names['NVCC']\n"
        "extension = nvcc and names['cuda_kernels'](nvcc)\n"
        "print(json.dumps(nvcc and [nvcc.path, extension.extra_compile_args, extension.define_macros]))\n"
    )
    variables = {k: v for k, v in os.environ.items() if not k.startswith("SAMA_KERNELS")}
    variables["SAMA_KERNELS_SPILLS"] = "error"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=variables, text=True, capture_output=True, check=True
    )
    found: Any = json.loads(result.stdout.splitlines()[-1])
    if found is None:
        unless_required("there is no nvcc >= 12.8")
    path, options, macros = found
    include = Path(torch.__file__).parent / "include"
    defined = [f"-D{name}={value}" if value else f"-D{name}" for name, value in macros]
    return Compiler(path, [*options, *defined, f"-isystem={include}"])


@dataclass
class Entry:
    """What ptxas says about one kernel."""

    kernel: str
    double: bool
    registers: int
    stack: int
    spilled: int


def parsed(log: str) -> list[Entry]:
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    entries = []
    for name, stack, stores, loads, registers in pattern.findall(log):
        kernels = [kernel for kernel in KERNELS if f"{len(kernel)}{kernel}" in name]
        assert len(kernels) == 1, f"{name} is none of KERNELS"
        template = name.partition(kernels[0])[2]
        double = template.startswith("Id") or KERNELS[kernels[0]][1] == 0
        entries.append(Entry(kernels[0], double, int(registers), int(stack), int(stores) + int(loads)))
    assert len(entries) == log.count("Compiling entry function")
    return entries


@pytest.fixture(scope="module")
def entries(compiler: Compiler, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Entry]]:
    """Per architecture, every kernel that comes out of the sources."""
    folder = tmp_path_factory.mktemp("cubin")
    everything = folder / "everything.cu"  # so that torch's headers are read once per architecture, not 21 times
    everything.write_text("".join(f'#include "{source}"\n' for source in SOURCES))

    def compile_all(architecture: str) -> list[Entry]:
        result = compiler.run(everything, architecture, folder / f"{architecture}.cubin")
        assert result.returncode == 0, result.stdout
        return parsed(result.stdout)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ARCHITECTURES, pool.map(compile_all, ARCHITECTURES), strict=True))


def test_every_kernel_is_listed() -> None:
    text = "".join(source.read_text() for folder in ("cuda", "common") for source in (ROOT / "csrc" / folder).iterdir())
    kernels = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(", text)
    assert len(kernels) == text.count("__global__") and sorted(kernels) == sorted(KERNELS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_compiled(entries: dict[str, list[Entry]], architecture: str) -> None:
    names = [entry.kernel for entry in entries[architecture]]
    assert {name: names.count(name) for name in KERNELS} == {name: count for name, (count, *_) in KERNELS.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills_no_stack_and_few_registers(entries: dict[str, list[Entry]], architecture: str) -> None:
    for entry in entries[architecture]:
        print(architecture, entry)
        assert entry.spilled == 0 and entry.stack == 0
        assert entry.registers <= KERNELS[entry.kernel][2 if entry.double else 1]


GREEDY = """
__global__ void __launch_bounds__(1024, 2) greedy_kernel(double* x) {
  double values[64];  // more than the 32 registers that these launch bounds leave
#pragma unroll
  for (int i = 0; i < 64; ++i) values[i] = x[1024 * i + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) x[1024 * i + threadIdx.x] = values[63 - i] * values[i];
}
"""


def test_a_spill_fails_the_build(compiler: Compiler, tmp_path: Path) -> None:
    source = tmp_path / "greedy.cu"
    source.write_text(GREEDY)
    result = compiler.run(source, "sm_90", tmp_path / "greedy.cubin")
    assert result.returncode != 0 and "pill" in result.stdout
    source.write_text(GREEDY.replace("64", "4").replace("63", "3"))
    assert compiler.run(source, "sm_90", tmp_path / "greedy.cubin").returncode == 0


@pytest.mark.parametrize("available", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_info_says_what_auto_would_use(monkeypatch: pytest.MonkeyPatch, available: bool, loaded: bool) -> None:
    """With and without a GPU, with and without the extension."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(backends.cuda, "_LOADED", available and loaded)
    choices = sk.info()["ops"]
    assert set(choices) == {
        "adapt_norm_adam",
        "adapt_norm_low_bit_adam",
        "adapt_norm_scale",
        "adapt_norm_moments",
        "step_size",
        "perturb",
        "restore",
        "central_difference",
    }
    for choice in choices.values():
        assert set(choice) == ({"cpu", "cuda"} if available else {"cpu"})
        for device, chosen in choice.items():
            assert chosen["backend"] == backends.resolve("auto", torch.device(device))
        if available and loaded:
            assert choice["cuda"] == {"backend": "cuda", "why": "compiled CUDA kernels (csrc/cuda)"}
        elif available:
            assert choice["cuda"]["backend"] != "cuda" and "_C_cuda is not part of" in choice["cuda"]["why"]


def test_the_extension_needs_no_cuda_library() -> None:
    """It loads where torch has no CUDA, and tells what it was built for."""
    spec = importlib.util.find_spec("sama_kernels._C_cuda")
    if spec is None or spec.origin is None:
        unless_required("_C_cuda is not part of this installation")
        return
    assert Path(spec.origin).name == "_C_cuda.abi3.so"
    script = "import torch, sama_kernels._C_cuda as m; print(m.ARCH_LIST)"
    listed = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True).stdout.strip()
    assert re.fullmatch(r"\d+\.\d[af]?(\+PTX)?(;\d+\.\d[af]?(\+PTX)?)*", listed)
    build = sk.info()["build"]
    assert build["cuda"] is True and build["cuda_arch_list"] == listed.split(";")
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    listing = subprocess.run(["nm", "-D", spec.origin], check=True, text=True, capture_output=True).stdout
    symbols = [line.split()[-2:] for line in listing.splitlines()]
    needed = [name.split("@")[0] for kind, name in symbols if kind == "U"]
    assert any(name.startswith("aoti_torch_") for name in needed)
    assert not [s for s in needed if re.match(r"cu[A-Z]|cuda[A-Z]|.*_cuda_(stream|guard)|_Z.*(c10|torch|2at)", s)]
    # Those of the runtime that is linked in are hidden: they must not take the place of torch's, nor torch's of them.
    assert not [name for kind, name in symbols if kind != "U" and re.match(r"_*cuda", name)]
