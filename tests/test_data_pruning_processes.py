"""The data-pruning program on two processes is the same experiment as on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sama_experiments import data_pruning

# Batches of 33 (132 samples in four): the parts of two processes differ in size. No batch normalisation in this model.
TINY = ["--limit", "150", "--epochs", "3", "--search-epochs", "3", "--averaged-epochs", "2", "--early-models", "1"]
TINY += ["--early-epochs", "1", "--ratios", "0.3", "--batch", "33", "--seeds", "0", "--device", "cpu"]
TINY += ["--methods", "el2n", "forgetting", "dynams", "sama"]


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    assert data_pruning.main([*TINY, "--out", str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "sama_experiments.data_pruning", *TINY, "--out", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("seed 0: accuracy with all samples") == 1
    one, two = (json.loads((tmp_path / name / "data_pruning.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len(one["runs"]) == len(two["runs"]) == 4
    for a, b in zip(one["runs"], two["runs"], strict=True):
        for key in ("method", "accuracy", "wrong_found", "pairs_reduced", "samples_seen"):
            assert a[key] == b[key]
    norms = [next(s["norm"] for s in result["searches"] if s["source"] == "sama") for result in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
