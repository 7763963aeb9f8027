"""Every Triton kernel, compiled for sm_80, sm_90 and sm_100 without a GPU: registers, spills, memory accesses."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from triton_required import require_triton

require_triton()

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton_cases import ARCHITECTURES, CASES, Case, Launch, jit_functions  # noqa: E402

# Registers per thread. Up to 128, an SM with 65536 holds 512 threads: 4 programs of 128, whose loads in flight hide
# each other's latency. The fallback for unaligned tensors keeps an address per element, and may take more.
REGISTERS = {True: 128, False: 224}
THREADS = 128


@dataclass(frozen=True)
class Compiled:
    ptx: str
    registers: int
    stack: int  # bytes per thread: spills, if anything
    local: int


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compiles a launch for an architecture, once in a run."""
    folder, known = tmp_path_factory.mktemp("cubins"), {}

    def get(launch: Launch, architecture: int) -> Compiled:
        key = (launch.key, architecture)
        if key not in known:
            known[key] = _compile(launch, architecture, folder / f"{len(known)}.cubin")
        return known[key]

    return get


def _compile(launch: Launch, architecture: int, cubin: Path) -> Compiled:
    source = ASTSource(fn=launch.kernel, signature=launch.signature, constexprs=launch.constants)
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)
    cubin.write_bytes(binary.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Compiled(binary.asm["ptx"], registers, stack, local)


def uncovered(cases: Sequence[Case]) -> set[str]:
    """The kernels that `cases` do not launch: @triton.jit functions that no other one calls."""
    functions = jit_functions()
    helpers = set()
    for function in functions.values():
        used = (function.fn.__globals__.get(name) for name in function.fn.__code__.co_names)
        helpers |= {id(other) for other in used if isinstance(other, JITFunction)}
    launched = {id(launch.kernel) for case in cases for launch in case.launches()}
    return {name for name, f in functions.items() if id(f) not in helpers | launched}


def test_every_kernel_is_compiled_ahead_of_time() -> None:
    assert not uncovered(CASES)


def test_a_kernel_without_a_case_is_noticed() -> None:
    without = [case for case in CASES if not case.name.startswith(("restore", "step size"))]
    names = {name.rpartition(".")[2] for name in uncovered(without)}
    assert names == {"restore_kernel", "step_size_kernel"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_registers_and_spills(case: Case, architecture: int, compiled: Any) -> None:
    launches = case.launches()
    assert launches
    for launch in launches:
        result = compiled(launch, architecture)
        print(f"sm_{architecture} {case.name}: {launch.kernel.__name__} {result.registers} registers")
        assert (result.stack, result.local) == (0, 0), f"{launch.kernel.__name__} spills"
        assert result.registers <= REGISTERS[case.aligned]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", [c for c in CASES if c.aligned and c.read], ids=lambda case: case.name)
def test_full_blocks_move_the_stated_bytes_in_16_byte_accesses(case: Case, architecture: int, compiled: Any) -> None:
    """Without a mask (no predicate before the instruction), and as many as the op's docstring says, not one more."""
    launch = case.launches()[0]
    ptx = compiled(launch, architecture).ptx
    accesses = {
        kind: len(re.findall(rf"^\s*{kind}\.global(?:\.\w+)*\.(?:v4\.b32|v2\.b64)\s", ptx, re.MULTILINE))
        for kind in ("ld", "st")
    }
    per_element = 16 * THREADS / launch.constants["BLOCK"]
    assert {kind: count * per_element for kind, count in accesses.items()} == {"ld": case.read, "st": case.written}


@pytest.mark.parametrize("case", [c for c in CASES if not c.aligned], ids=lambda case: case.name)
def test_unaligned_tensors_are_not_accessed_in_vectors(case: Case, compiled: Any) -> None:
    for launch in case.launches():
        assert not re.search(r"\b(ld|st)\.global\S*\.v\d", compiled(launch, 90).ptx)


@pytest.mark.parametrize("case", [c for c in CASES if not c.scalars_on_device], ids=lambda case: case.name)
def test_arithmetic_is_that_of_the_reference(case: Case, compiled: Any) -> None:
    """Every operation is rounded to nearest by itself: nothing fused, approximate or flushing denormals to zero.

    Not where step counters are on the device: there libdevice's exp2 uses such instructions inside.
    """
    for launch in case.launches():
        for architecture in ARCHITECTURES:
            ptx = compiled(launch, architecture).ptx
            assert not re.search(r"\b(fma|mad\.(f|rn)|\S*\.approx|\S*\.ftz|div\.full)", ptx)


def test_one_philox_call_serves_eight_elements(compiled: Any) -> None:
    """20 multiplications for eight elements of a thread, in the loop over full blocks and in the tail each."""
    case = next(case for case in CASES if case.name == "plus bfloat16, stochastic")
    (launch,) = case.launches()
    ptx = compiled(launch, 90).ptx
    assert launch.constants["BLOCK"] == 8 * THREADS
    products = len(re.findall(r"\bmul\.(hi|wide)\.u32", ptx))
    assert 2 * 20 <= products <= 2 * 20 + 4  # and a few for addresses
    assert "shfl" not in ptx and ".shared" not in ptx  # nor is any random number moved between threads
