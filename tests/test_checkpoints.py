"""The file that programs go on from after they were killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sama_experiments.common.checkpoints import Checkpoint, random_state, set_random_state
from sama_experiments.common.errors import ExperimentError

SETTINGS = {"steps": 3, "methods": ["a", "b"]}


def test_results_and_state_survive(tmp_path: Path) -> None:
    first = Checkpoint(tmp_path, SETTINGS)
    assert not first.resumed and first.result("a") is None and first.state("a") is None
    first.finish("a", {"accuracy": 0.5, "curve": [(1, 0.25)]})
    first.save("b", {"weights": torch.arange(3.0)})
    again = Checkpoint(tmp_path, SETTINGS)
    assert again.resumed and again.result("a") == {"accuracy": 0.5, "curve": [(1, 0.25)]}
    assert again.state("a") is None and torch.equal(again.state("b")["weights"], torch.arange(3.0))
    again.finish("b", {"accuracy": 1.0})
    assert again.state("b") is None and Checkpoint(tmp_path, SETTINGS).result("b") == {"accuracy": 1.0}
    again.remove()
    assert not Checkpoint(tmp_path, SETTINGS).resumed and list(tmp_path.iterdir()) == []


def test_other_settings_are_refused(tmp_path: Path) -> None:
    Checkpoint(tmp_path, SETTINGS).finish("a", 1)
    with pytest.raises(ExperimentError, match=r"steps = 3, not 4: .*--restart"):
        Checkpoint(tmp_path, {**SETTINGS, "steps": 4})
    assert not Checkpoint(tmp_path, {**SETTINGS, "steps": 4}, restart=True).resumed
    assert Checkpoint(tmp_path, SETTINGS).resumed  # nothing was lost: nothing has been written over it yet


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"nonsense")
    with pytest.raises(ExperimentError, match="cannot be read; --restart"):
        Checkpoint(tmp_path, SETTINGS)
    torch.save([1, 2], tmp_path / "checkpoint.pt")
    with pytest.raises(ExperimentError, match="cannot be read"):
        Checkpoint(tmp_path, SETTINGS)


def test_a_kill_while_writing_leaves_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path, SETTINGS)
    checkpoint.save("a", 1)

    def killed(content: object, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save("a", 2)
    monkeypatch.undo()
    assert Checkpoint(tmp_path, SETTINGS).state("a") == 1


def test_random_numbers_go_on() -> None:
    states = random_state()
    expected = torch.randn(3)
    set_random_state(states)
    assert torch.equal(torch.randn(3), expected)
