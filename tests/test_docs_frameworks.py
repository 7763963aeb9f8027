"""Every code block of docs/frameworks.md runs, in order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("transformers", "accelerate", "pytorch_lightning"):
    pytest.importorskip(package)
TEXT = (Path(__file__).parents[1] / "docs" / "frameworks.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    assert len(BLOCKS) == TEXT.count("```") // 2 == 4
    names: dict[str, Any] = {"__name__": "frameworks"}
    _, trainer, accelerate, lightning = BLOCKS
    exec(compile(BLOCKS[0], "docs/frameworks.md, block 0", "exec"), names)
    exec(compile(trainer, "docs/frameworks.md, block 1", "exec"), names)
    history = names["trainer"].state.log_history
    assert [row["meta_degenerate"] for row in history if "meta_loss" in row] == [0.0] * 3
    found = []
    for i, block in enumerate((accelerate, lightning), start=2):
        exec(compile(block, f"docs/frameworks.md, block {i}", "exec"), names)
        found.append(names["out"])
    assert all(not out.degenerate and all(g.norm() > 0 for g in out.grads) for out in found)
    assert names["module"].weight_net is not names["weight_net"]
