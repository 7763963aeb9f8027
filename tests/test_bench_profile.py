"""bench.profile: what it makes of Nsight Compute's table, and what it says where there is none."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import pytest
import torch

from bench import profile

WAIT, PIPE = profile.WAITS[0] + "{}" + profile.WAITS[1], profile.PIPES[0] + "{}" + profile.PIPES[1]
METRICS = {
    **dict.fromkeys(profile.METRICS.values(), "1"),
    "dram__bytes_read.sum": "600,000,000",
    "dram__bytes_write.sum": "190,000,000",
    "smsp__inst_executed.sum": "187,500,000",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "68.4",
    WAIT.format("wait"): "1.5",
    WAIT.format("long_scoreboard"): "4.8",
    WAIT.format("barrier"): "n/a",
    PIPE.format("alu"): "31.9",
}


def fake_ncu(folder: Path, kernels: int) -> None:
    """Writes the table that the real one would, of so many kernels, into the file that it is told."""
    names = ["ID", "Kernel Name", *METRICS]
    rows = [names, ["", *["unit"] * (len(names) - 1)], *[[str(i), "kernel", *METRICS.values()] for i in range(kernels)]]
    table = "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
    program = folder / "ncu"
    program.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"open(sys.argv[sys.argv.index('--log-file') + 1], 'w').write({'==PROF== Connected' + chr(10) + table!r})\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(profile, "machine", lambda: {"commit": "abc"})
    return tmp_path


def test_a_profile(on_a_gpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_ncu(on_a_gpu, 2)
    options = ["--out", str(on_a_gpu), "--dtypes", "bf16", "--ops", "adapt_norm_rmsprop", "restore"]
    assert profile.main(options) == 0
    header, rmsprop, restore = map(json.loads, (on_a_gpu / "profile_cuda.jsonl").read_text().splitlines())
    assert header == {"machine": {"commit": "abc"}} and restore["op"] == "restore"
    assert rmsprop["waits"] == {"long_scoreboard": 4.8, "wait": 1.5} and rmsprop["pipes_percent"] == {"alu": 31.9}
    line = next(x for x in capsys.readouterr().out.splitlines() if "rmsprop" in x)
    # 7.9e8 bytes and 187.5e6 instructions of 32 threads each, for 1e8 elements.
    assert "| bf16 | 7.90, 8 |" in line and "| 68 % |" in line and "| 60.0 | long_scoreboard 4.8, wait 1.5 |" in line


def test_as_many_kernels_as_ops(on_a_gpu: Path) -> None:
    fake_ncu(on_a_gpu, 3)
    with pytest.raises(SystemExit, match="2 ops, but 3 kernels"):
        profile.main(["--out", str(on_a_gpu), "--dtypes", "fp32", "--ops", "perturb_plus", "perturb_minus"])
    assert not (on_a_gpu / "profile_cuda.jsonl").exists()


def test_without_a_gpu_or_ncu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(profile.shutil, "which", lambda name, path: None)
    assert profile.main([]) == 3 and "needs ncu (Nsight Compute)" in capsys.readouterr().err
    monkeypatch.setattr(profile.shutil, "which", lambda name, path: "ncu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert profile.main([]) == 3 and "needs a GPU that torch sees" in capsys.readouterr().err


def test_ops_that_are_profiled_are_those_that_are_timed() -> None:
    timed = {op.name for op in profile.op_list(profile.PRECISIONS["bf16"])}
    assert {*profile.OPS} == timed - {"step_size", "element_wise_part"}  # no model-sized kernel; those of the others
