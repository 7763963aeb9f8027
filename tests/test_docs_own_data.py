"""The example of docs/own_data.md runs and finds what it says, with a model that is made here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from tiny_bert import make_tiny_bert

from sama_experiments import own_data

PAGE = Path(__file__).parent.parent / "docs" / "own_data.md"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    make_tiny_bert(tmp_path / "model", dropout=0.1)
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(block, f"{PAGE.name}, example", "exec"), {})
    commands = re.findall(r"^sama-kernels (.*)$", text, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["weigh", "prune"]
    tiny = {"weigh": ["--model", "model", "--max-tokens", "12", "--lr", "3e-3", "--device", "cpu"], "prune": []}
    for command in commands:
        arguments = shlex.split(command)
        assert own_data.main([*arguments, *tiny[arguments[0]]]) == 0
    assert len(Path("kept.jsonl").read_text().splitlines()) == 96
    assert "<svg" in Path("report.html").read_text()
    printed = capsys.readouterr().out
    assert "120 of 121 rows weighed, 40 clean rows" in printed and "1 bad rows in --train" in printed
    for name in re.findall(r"`(weights\.csv\.[a-z_.]+)`", text):
        assert Path(name).is_file()
