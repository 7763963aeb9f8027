"""Every code block of docs/precision.md runs, in order, and does what the text around it says."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import sama_kernels as sk

TEXT = (Path(__file__).parents[1] / "docs" / "precision.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_every_block_runs() -> None:
    torch.manual_seed(0)
    assert len(BLOCKS) == TEXT.count("```") // 2 == 7
    names: dict[str, Any] = {}
    for i, block in enumerate(BLOCKS):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(compile(block, f"docs/precision.md, block {i}", "exec"), names)
        if "out" in names:
            assert not names["out"].degenerate and (names["out"].grads[0] != 0).any(), f"block {i}"
    assert sk.state_dict(names["optimizer"]) == names["checkpoint"]["sama"]


@pytest.mark.parametrize("name", ["clip_coef", "clip_rank_one", "clip_value", "grad_scaler", "master_params"])
def test_every_argument_is_described(name: str) -> None:
    assert f"`{name}" in TEXT or f"{name}=" in TEXT
