"""Imports point strictly downwards, and the files stay small: held by a test, not by good intentions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sama_kernels

ROOT = Path(sama_kernels.__file__).parent

# From the top. A module may import from layers below its own; within `ops/`, `backends/`, `adaptation/` the package
# file stands above its members.
LAYERS = [
    ["sama_kernels.__main__"],
    ["sama_kernels.integrations.transformers"],
    ["sama_kernels"],
    ["sama_kernels.integrations.trainer_checks"],
    ["sama_kernels.info", "sama_kernels.diagnose"],
    ["sama_kernels.meta_gradient"],
    ["sama_kernels.algorithms"],
    ["sama_kernels.algorithms.second_order"],
    [f"sama_kernels.algorithms.{name}" for name in ("implicit", "unrolled", "penalty")],
    [f"sama_kernels.algorithms.{name}" for name in ("hessian", "options", "substitution", "adam_step")],
    ["sama_kernels.algorithms.second_derivatives", "sama_kernels.algorithms.torch_step"],
    ["sama_kernels.function", "sama_kernels.differences", "sama_kernels.direction"],
    ["sama_kernels.jvp"],
    ["sama_kernels.passes", "sama_kernels.clipping", "sama_kernels.scaling"],
    ["sama_kernels.step_length"],
    ["sama_kernels.checkpoint"],
    ["sama_kernels.adaptation"],
    ["sama_kernels.adaptation.registry"],
    [f"sama_kernels.adaptation.{family}" for family in ("adam", "sgd", "ratio", "maximum", "adadelta", "asgd")],
    [f"sama_kernels.adaptation.{family}" for family in ("adafactor", "muon", "constant", "low_bit")],
    ["sama_kernels.adaptation.general", "sama_kernels.adaptation.moments"],
    ["sama_kernels.adaptation.plan", "sama_kernels.detach_watch"],
    ["sama_kernels.adaptation.step_record"],
    ["sama_kernels.mask_draws"],
    ["sama_kernels.perturbation"],
    ["sama_kernels.held_values"],
    ["sama_kernels.ops"],
    ["sama_kernels.ops.adapt_norm_moments", "sama_kernels.ops.adapt_norm_low_bit"],
    [f"sama_kernels.ops.{op}" for op in ("adapt_norm", "step_size", "perturb", "restore", "central_difference")],
    ["sama_kernels.ops._library"],
    ["sama_kernels.backends"],
    [f"sama_kernels.backends.{name}" for name in ("reference", "cpu", "cuda", "triton")],
    ["sama_kernels.backends.triton.adapt_norm_low_bit"],
    [f"sama_kernels.backends.triton.{op}" for op in ("adapt_norm", "adapt_norm_moments", "step_size", "perturb")],
    [f"sama_kernels.backends.triton.{op}" for op in ("restore", "central_difference")],
    ["sama_kernels.backends.triton.launch", "sama_kernels.backends.triton.chunks"],
    [f"sama_kernels.backends.triton.{name}" for name in ("tables", "storage", "rounded")],
    [f"sama_kernels.backends.{name}" for name in ("rounding", "moments", "low_bit", "extension")],
    ["sama_kernels.backends.arguments"],
    ["sama_kernels.distributed"],
    ["sama_kernels.distributed.exchange", "sama_kernels.distributed.arguments"],
    ["sama_kernels.distributed.alone"],
    ["sama_kernels.distributed.reduction", "sama_kernels.distributed.agreement", "sama_kernels.distributed.wrapped"],
    ["sama_kernels.distributed.buckets", "sama_kernels.distributed.standing_in"],
    ["sama_kernels.distributed.meeting", "sama_kernels.distributed.collectives"],
    [
        "sama_kernels.checks",
        "sama_kernels.loss_checks",
        "sama_kernels.written",
        "sama_kernels.buffers",
        "sama_kernels.guards",
        "sama_kernels.ownership",
        "sama_kernels.reach",
        "sama_kernels.ladder",
    ],
    ["sama_kernels.generators"],
    ["sama_kernels.shared_memory"],
    ["sama_kernels.distributed.sharded", "sama_kernels.distributed.fsdp"],
    [
        "sama_kernels.types",
        "sama_kernels.version",
        "sama_kernels.diagnosis",
        "sama_kernels.graphs",
        "sama_kernels.hooks",
        "sama_kernels.nn",
        "sama_kernels.trees",
        "sama_kernels.learned",
    ],
    ["sama_kernels.integrations.optimizers", "sama_kernels.integrations.endless"],
    ["sama_kernels.integrations"],
    ["sama_kernels.upload"],
]
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in RANK else node.module for name in inner}
    return {name for name in names if name.split(".")[0] in ("sama_kernels", "sama_experiments", "bench", "tests")}


def test_every_module_has_a_layer() -> None:
    assert set(modules()) == set(RANK)


@pytest.mark.parametrize("module", sorted(RANK))
def test_imports_point_down(module: str) -> None:
    for name in imported(modules()[module]):
        assert RANK[name] > RANK[module], f"{module} imports {name}, which is not below it"


def test_files_are_small() -> None:
    repository = ROOT.parent
    folders = ("sama_kernels", "python", "csrc", "bench", "tests")
    files = [
        p for f in folders for p in (repository / f).rglob("*") if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
    ]
    assert len(files) > 30
    long = {str(p.relative_to(repository)): n for p in files if (n := len(p.read_text().splitlines())) > 350}
    assert not long


def test_experiments_use_the_public_interface_only() -> None:
    for path in (ROOT.parent / "python").rglob("*.py"):
        used = {n for n in imported(path) if n.startswith("sama_kernels")}
        assert used <= {"sama_kernels", "sama_kernels.algorithms", "sama_kernels.nn"}, path
