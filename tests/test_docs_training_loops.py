"""Every code block of docs/training_loops.md runs, in order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("transformers", "peft", "accelerate"):
    pytest.importorskip(package)
TEXT = (Path(__file__).parents[1] / "docs" / "training_loops.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def test_every_block_runs() -> None:
    torch.manual_seed(0)
    assert len(BLOCKS) == TEXT.count("```") // 2 == 9
    names: dict[str, Any] = {"__name__": "training_loops"}
    seen = []
    for i, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/training_loops.md, block {i}", "exec"), names)
        out = names["out"]
        assert not out.degenerate and all(g.norm() > 0 for g in out.grads), f"block {i}"
        seen.append(out)
    assert len({id(out) for out in seen}) == 8  # the block of the compiled loss makes no meta step
    loss = names["base_loss"]
    assert loss() > 0 and names["temperature"].grad is not None
