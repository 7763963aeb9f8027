"""The installation: what the compiled extension needs, and what a build without its prerequisites says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sama_kernels
from sama_kernels.backends import cpu

ROOT = Path(__file__).parents[1]
needs_cpu_kernels = pytest.mark.skipif(cpu.missing() is not None, reason="installed without compiled kernels")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def extension() -> Path:
    import sama_kernels._C  # type: ignore[import-not-found]

    return Path(sama_kernels._C.__file__)


@pytest.fixture
def setup(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs setup.py in a copy of the sources, so that nothing that is in use is touched."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "sama_kernels", "python"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
        )
    for name in ("README.md", "LICENSE"):
        (tmp_path / name).write_text("stands for the real one")

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("SAMA_KERNELS", "TORCH_CUDA", "CUDA_"))}
        variables |= environment
        command = [sys.executable, "setup.py", "-q", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=variables, text=True, capture_output=True)

    return run


@needs_cpu_kernels
def test_the_extension_is_abi3_and_needs_only_the_stable_abi_of_torch() -> None:
    path = extension()
    assert path.name == "_C.abi3.so"
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    listing = subprocess.run(["nm", "-D", "--undefined-only", path], check=True, text=True, capture_output=True).stdout
    symbols = [line.split()[-1] for line in listing.splitlines()]
    assert any(s.startswith("aoti_torch_") for s in symbols)
    unstable = [s for s in symbols if re.match(r"_Z.*(c10|torch|2at)", s)]
    assert not unstable
    python = [s for s in symbols if s.startswith("_Py") or re.match(r"Py[A-Z]", s)]
    assert sorted(python) == ["PyGILState_Ensure", "PyGILState_Release", "PyModule_Create2"]  # all of the limited API


def test_the_version_is_the_one_that_is_installed() -> None:
    from importlib.metadata import version

    assert sama_kernels.__version__ == version("sama_kernels")


def one_message(result: subprocess.CompletedProcess[str]) -> str:
    """The error output of a failed build; fails on a traceback."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return result.stderr


def test_missing_compiler(setup: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    message = one_message(setup("build_ext", CXX="no-such-compiler"))
    assert "no C++ compiler" in message and "apt-get install g++" in message and "SAMA_KERNELS_EXT=0" in message


def test_missing_torch(setup: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    # A finder that is asked first and says no: as on a machine without torch.
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
    )
    message = one_message(setup("build_ext", PYTHONPATH=str(tmp_path)))
    assert "torch was not found" in message and "--no-build-isolation" in message


@pytest.fixture
def fake_nvcc(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Environments in which the only nvcc is one that says it is of this release; "" for none at all."""

    def environment(release: str) -> dict[str, str]:
        fake = tmp_path / "toolkit/bin/nvcc"
        fake.parent.mkdir(parents=True, exist_ok=True)
        fake.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
        fake.chmod(0o755)
        (tmp_path / "toolkit/lib64").mkdir(exist_ok=True)
        (tmp_path / "toolkit/lib64/libcudart_static.a").touch()
        (tmp_path / "sitecustomize.py").write_text(
            "import shutil\n"
            "which = shutil.which\n"
            f"nvcc = {str(fake) if release else None!r}\n"
            "shutil.which = lambda name, *rest, **more: nvcc if name == 'nvcc' else which(name, *rest, **more)\n"
        )
        return {"PYTHONPATH": str(tmp_path)}

    return environment


def test_cuda_asked_for(
    setup: Callable[..., subprocess.CompletedProcess[str]], fake_nvcc: Callable[[str], dict[str, str]]
) -> None:
    message = one_message(setup("--version", SAMA_KERNELS_CUDA="1", **fake_nvcc("")))
    assert "SAMA_KERNELS_CUDA=1, but no nvcc in CUDA_HOME, CUDA_PATH, PATH" in message and "12.8 or newer" in message
    without = setup("--version", SAMA_KERNELS_CUDA="auto", **fake_nvcc(""))
    assert without.stdout.strip() == sama_kernels.__version__
    assert "without CUDA kernels, because no nvcc" in without.stderr
    message = one_message(setup("--version", SAMA_KERNELS_CUDA="1", **fake_nvcc("12.6")))
    assert "nvcc is of CUDA 12.6. The CUDA kernels need" in message
    assert "is none of auto, 0, 1" in one_message(setup("--version", SAMA_KERNELS_CUDA="on"))
    assert "is none of 0, 1" in one_message(setup("--version", SAMA_KERNELS_EXT="yes"))


@pytest.mark.parametrize(
    ("wanted", "archs", "code"),
    [
        ("", "8.0;9.0;10.0+PTX", "sm_80 sm_90 sm_100 compute_100"),
        ("8.0 9.0", "8.0;9.0", "sm_80 sm_90"),
        ("9.0a;10.0f+PTX", "9.0a;10.0f+PTX", "sm_90a sm_100f compute_100f"),
        ("Ampere, Hopper+PTX", "8.0;8.6+PTX;9.0+PTX", "sm_80 sm_86 compute_86 sm_90 compute_90"),
    ],
)
def test_architectures(
    setup: Callable[..., subprocess.CompletedProcess[str]],
    fake_nvcc: Callable[[str], dict[str, str]],
    tmp_path: Path,
    wanted: str,
    archs: str,
    code: str,
) -> None:
    script = tmp_path / "flags.py"
    script.write_text(
        "import runpy, sys\n"
        "sys.argv = ['setup.py', '-q', '--version']\n"
        "names = runpy.run_path('setup.py')\n"
        "found = names['cuda_archs']()\n"
        "print(';'.join(found), *(flag.rpartition('code=')[2] for flag in names['gencode'](found)))\n"
    )
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": wanted, **fake_nvcc("13.0")}
    result = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, text=True, capture_output=True, check=True
    )
    assert result.stdout.splitlines()[-1] == f"{archs} {code}"


def test_an_unknown_architecture(
    setup: Callable[..., subprocess.CompletedProcess[str]], fake_nvcc: Callable[[str], dict[str, str]]
) -> None:
    for wanted in ("Hoper", "6.1", "90"):
        message = one_message(setup("--version", TORCH_CUDA_ARCH_LIST=f"8.0;{wanted}", **fake_nvcc("13.0")))
        assert f"'{wanted}' is no compute capability from 7.0 on" in message


def test_pure_python_wheel(setup: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    result = setup("bdist_wheel", SAMA_KERNELS_EXT="0", CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name == f"sama_kernels-{sama_kernels.__version__}-py3-none-any.whl"
    names = shutil.which("unzip") and subprocess.run(["unzip", "-l", wheel], text=True, capture_output=True).stdout
    for file in ("sama_kernels/py.typed", "sama_kernels/ops/perturb.py", "sama_experiments/"):
        assert not names or file in names


RESULTS = """
import hashlib, sys, torch
library = torch.library.Library("sama", "DEF")
for schema in sys.argv[2:]:
    library.define(schema)
torch.ops.load_library(sys.argv[1])
torch.manual_seed(5)
torch.set_num_threads(1)
digest = hashlib.sha256()
half, single, double = torch.bfloat16, torch.float32, torch.float64
for dtype in (single, double, half, torch.float16):
    def randn(scale=1.0):
        return [(scale * torch.randn(n)).to(dtype) for n in (1, 70001, 515)]
    v, p, w = randn(), randn(), [x.float().square() for x in randn()]
    steps = [torch.tensor(3.0)] * 3
    for variant in (0, 1):
        norm = torch.ops.sama.adapt_norm_adam(
            v, randn(), randn(0.1), w, w, p, steps, None, 0.1, 0.9, 0.99, 1e-8, 0.1, bool(variant), variant)
        digest.update(norm.numpy().tobytes())
    norm, epsilon, flag = torch.ops.sama.step_size([norm, torch.ops.sama.adapt_norm_scale(v, None, 0.3)], 1.0, 0.0)
    for side, rounding in ((0, 0), (1, 0), (0, 1)):
        sums = torch.ops.sama.perturb(p, v, epsilon, side, rounding, 17, True)
        digest.update(b"".join(x.view(torch.uint8).numpy().tobytes() for x in [*p, *v, sums]))
    torch.ops.sama.restore(p, v)
    torch.ops.sama.central_difference(p, randn(), randn(), epsilon, norm)
    digest.update(b"".join(x.view(torch.uint8).numpy().tobytes() for x in p))
print(digest.hexdigest())
"""


@needs_cpu_kernels
@needs_compiler
def test_same_bits_on_every_instruction_set(tmp_path: Path) -> None:
    """The kernels built for plain x86-64 (SSE2) give the bits of those that this machine's loader chose."""
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux builds choose at load time")
    import sysconfig

    torch_path = Path(torch.__file__).parent
    baseline = tmp_path / "baseline.so"
    folders = [ROOT / "csrc/common", ROOT / "csrc/cpu"]
    sources = [path for folder in folders for path in sorted(folder.glob("*.cpp")) if path.name != "module.cpp"]
    flags = [
        "-std=c++17", "-O3", "-g0", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-math-errno",
        "-fno-trapping-math", "-ffp-contract=off", "-Wno-psabi", "-DSAMA_NO_CLONES",
        "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
        f"-I{torch_path / 'include'}", f"-I{sysconfig.get_path('include')}", f"-L{torch_path / 'lib'}", "-ltorch_cpu",
    ]  # fmt: skip
    subprocess.run(["c++", *map(str, sources), *flags, "-o", str(baseline)], check=True)
    names = ("adapt_norm_adam", "adapt_norm_scale", "step_size", "perturb", "restore", "central_difference")
    schemas = [str(getattr(torch.ops.sama, name).default._schema).removeprefix("sama::") for name in names]
    digests = [
        subprocess.run(
            [sys.executable, "-c", RESULTS, str(library), *schemas], check=True, text=True, capture_output=True
        ).stdout
        for library in (extension(), baseline)
    ]
    assert digests[0] == digests[1]
