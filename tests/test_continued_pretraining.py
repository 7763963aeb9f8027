"""The continued-pretraining program from end to end, on a BERT of random weights that is made here."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_bert import make_tiny_bert

from sama_experiments import continued_pretraining
from sama_experiments.continued_pretraining import memory
from sama_experiments.continued_pretraining.options import DEFAULT_METHODS

TINY = ["--limit", "300", "--per-domain", "30", "--labels", "20", "--steps", "12", "--batch", "4", "--meta-start", "2"]
TINY += [
    "--auxiliary-batch",
    "4",
    "--meta-batch",
    "4",
    "--head-steps",
    "3",
    "--score-texts",
    "20",
    "--max-tokens",
    "12",
]


MORE = ["tartan-mt-own", "sama-loss", "sama-na", "sama-domain"]  # not in the default


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_tiny_bert(tmp_path_factory.mktemp("tiny_bert"), dropout=0.1)


def run(model_folder, out, *more: str) -> dict:
    status = continued_pretraining.main(["--model", str(model_folder), "--out", str(out), *TINY, *more])
    assert status == 0
    return json.loads((out / "continued_pretraining.json").read_text())


def test_whole_program(model_folder, tmp_path, capsys):
    result = run(model_folder, tmp_path, "--seeds", "0", "1", "--methods", *DEFAULT_METHODS, *MORE)
    table = {row["method"]: row for row in result["table"]}
    assert list(table) == [*DEFAULT_METHODS, *MORE]
    assert {(r["method"], r["seed"]) for r in result["runs"]} == {(m, s) for m in table for s in (0, 1)}
    for row in result["runs"]:
        learns = row["method"].startswith("sama")
        assert row["steps"] == (24 if row["method"] == "dapt" else 12) and 0 <= row["score"] <= 1
        assert len(row["losses"]) == 4 and len(row["weights"]) == (4 if learns else 0)
        assert (row["weight_auc"] is not None) == learns and row["degenerate_meta_steps"] == 0
        assert not learns or max(abs(weight - 1) for weight in row["weights"]) > 1e-4  # they have moved
    assert table["finetune"]["paper"] == 79.93 and table["sama"]["paper"] == 83.29
    assert (tmp_path / "continued_pretraining.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "checkpoint.pt").exists()
    printed = capsys.readouterr().out
    assert "AUC of movies" in printed and "mean learned weight" in printed


def test_paper_preset_on_a_folder(model_folder, tmp_path):
    data = tmp_path / "chemprot"
    data.mkdir()
    for split, count in (("train", 18), ("dev", 6), ("test", 6)):
        records = [{"text": "a good film" if i % 2 else "bad movie is bad", "label": "AB"[i % 2]} for i in range(count)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "news.txt").write_text("the film\na movie\n" * 4)
    arguments = [
        "--paper",
        "--data",
        str(data),
        "--auxiliary",
        str(tmp_path / "news.txt"),
        "--model",
        str(model_folder),
    ]
    status = continued_pretraining.main(
        [*arguments, "--out", str(tmp_path), "--epochs", "6", "--max-tokens", "8", "--seeds", "0", "--alpha", "0.01"]
    )
    assert status == 0
    result = json.loads((tmp_path / "continued_pretraining.json").read_text())
    settings, options = result["options"]["settings"], result["options"]
    assert settings["base_lr"] == 2e-5 and settings["meta_lr"] == 1e-5 and settings["warmup"] == 0.6
    assert settings["unroll"] == 10 and settings["update_base"] and settings["alpha"] == 0.01
    assert options["train_layers"] is None and result["data"]["metric"] == "micro-f1"
    assert result["data"]["auxiliary"] == {"task": 18, "news": 8}
    rows = {row["method"]: row for row in result["runs"]}
    assert list(rows) == ["finetune", "dapt", "tartan-mt", "sama-loss"]
    assert rows["finetune"]["steps"] == 12 and rows["dapt"]["steps"] == 24  # 6 passes of 18 texts in batches of 16
    assert [row["paper"] for row in result["table"]] == [82.70, 84.17, 84.18, 84.49]


def test_killed_and_started_again(model_folder, tmp_path):
    """kill -9 in the middle of the last run; a second start gives what an undisturbed program gives."""
    more = ["--steps", "80", "--seeds", "3", "--methods", "dapt", "sama"]
    command = [sys.executable, "-m", "sama_experiments.continued_pretraining", "--model", str(model_folder), *TINY]
    command += [*more, "--out", str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        kept = tmp_path / "killed" / "checkpoint.pt"
        for _ in range(3000):
            state = torch.load(kept, weights_only=True) if kept.is_file() else {"run": None}
            if state["run"] == "sama, seed 3":
                break
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert 0 < state["state"]["trainer"]["step"] < 80 and list(state["results"]) == ["language head", "dapt, seed 3"]
    assert continued_pretraining.main([*command[3:-2], "--out", str(tmp_path / "killed"), "--lr", "1e-3"]) == 2
    runs = [run(model_folder, tmp_path / name, *more)["runs"] for name in ("killed", "undisturbed")]
    for resumed, straight in zip(*runs, strict=True):
        assert resumed["score"] == straight["score"] and resumed["curve"] == straight["curve"]
        for field in ("losses", "weights"):
            torch.testing.assert_close(
                torch.tensor(resumed[field]), torch.tensor(straight[field]), atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere", "--limit", "all"], "--data nowhere: no such folder"),
        (["--data", "nowhere", "--limit", "9"], "--limit is for the movie reviews"),
        (["--auxiliary", "a.txt"], "--auxiliary is for --data"),
        (["--labels", "2000"], "--labels 2000: the train split has only"),
        (["--per-domain", "9999"], "--per-domain 9999"),
        (["--train-layers", "9"], "--train-layers 9: the model has only 3 layers"),
        (["--score-on", "validation", "--methods", "sama-dev"], "--score-on validation: sama-dev learns from"),
        (["--memory", "--memory-sizes", "x"], "--memory-sizes x: expected LAYERSxWIDTH"),
    ],
)
def test_errors_are_one_line(model_folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert continued_pretraining.main(["--model", str(model_folder), "--out", "out", *TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_several_processes_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    assert continued_pretraining.main(["--out", str(tmp_path)]) == 2
    assert "one process" in capsys.readouterr().err


def test_memory_mode(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "VOCABULARY", 1000)
    arguments = ["--memory", "--memory-sizes", "1x64", "2x64", "--memory-algorithms", "finetune", "sama"]
    assert continued_pretraining.main([*arguments, "--out", str(tmp_path), "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "continued_pretraining_memory.json").read_text())
    assert [(p["size"], p["algorithm"]) for p in result["points"]] == [
        ("1x64", "finetune"), ("1x64", "sama"), ("2x64", "finetune"), ("2x64", "sama")
    ]  # fmt: skip
    assert (tmp_path / "continued_pretraining_memory.png").read_bytes().startswith(b"\x89PNG")
    assert "peak memory" in capsys.readouterr().out
