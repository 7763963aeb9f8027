"""The examples in docs/alpha.md run, one after the other in one namespace, and say what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "alpha.md"


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    namespace: dict[str, Any] = {}
    for i, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, example {i + 1}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert re.search(r"central \S+, forward \S+", printed) and "alpha too large: " in printed and "  cure: " in printed
