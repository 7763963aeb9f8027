"""`sama-kernels weigh` and `prune` from end to end, on a BERT of random weights and sentences of 12 words."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bert import make_tiny_bert

from sama_experiments import own_data
from sama_experiments.own_data import page, weights_file
from sama_experiments.own_data.pruning import highest
from sama_experiments.own_data.scores import margins

ROWS, WRONG = 150, 30
TINY = ["--lr", "3e-3", "--epochs", "12", "--max-tokens", "12", "--batch", "16", "--meta-lr", "0.02", "--device", "cpu"]
BAD_LINES = ["", "{broken", '{"text": "", "label": 1}', '{"text": "<script>bad</script>", "label": "neither"}']
COLUMNS = [
    "row",
    "label",
    "weight",
    "suspicion",
    "suspected",
    "proposed_label",
    "loss",
    "confidence",
]


def sentence(draw: random.Random, good: bool) -> str:
    return " ".join([*draw.sample(["the", "a", "film", "is", "movie"], 3), *["good" if good else "bad"] * 2])


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [{"text": f"{sentence(draw, i % 2 == 1)} <{i}>", "label": i % 2} for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl (its first rows have the wrong label, its last lines are bad), dev.jsonl and a model."""
    folder = tmp_path_factory.mktemp("own_data")
    (folder / "model").mkdir()
    make_tiny_bert(folder / "model", dropout=0.1)
    train = rows(ROWS, 0)
    for row in train[:WRONG]:
        row["label"] = 1 - row["label"]
    lines = [json.dumps(row, indent=None if i % 2 else 0).replace("\n", " ") for i, row in enumerate(train)]
    (folder / "train.jsonl").write_text("\n".join([*lines, *BAD_LINES]) + "\n")
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(40, 1)))
    return folder


def weigh(folder: Path, out: Path, *more: str) -> int:
    given = {"--train": "train.jsonl", "--clean": "dev.jsonl", "--model": "model"}
    files = [part for flag, name in given.items() if flag not in more for part in (flag, str(folder / name))]
    return own_data.main(["weigh", "--out", str(out), *files, *TINY, *more])


@pytest.fixture(scope="module")
def weights(folder: Path) -> Path:
    out = folder / "weights.jsonl"
    assert weigh(folder, out) == 0
    return out


def read(path: Path) -> dict[str, torch.Tensor]:
    return weights_file.read(path, ["0", "1"], COLUMNS)


def prune(folder: Path, weights: Path, out: Path, *more: str) -> int:
    files = ["--weights", str(weights), "--train", str(folder / "train.jsonl"), "--out", str(out / "kept.jsonl")]
    return own_data.main(["prune", *files, "--report", str(out / "report.html"), "--keep", "0.8", *more])


def test_wrong_labels_are_suspected(weights: Path) -> None:
    table = read(weights)
    assert table["row"].tolist() == list(range(ROWS))
    suspected = table["suspected"]
    assert suspected[:WRONG].float().mean() > 0.8 and suspected[WRONG:].float().mean() < 0.1
    assert (table["proposed_label"] != table["label"])[suspected].all()
    assert table["weight"][:WRONG].mean() < table["weight"][WRONG:].mean() - 0.3
    assert ((table["suspicion"] >= 0) & (table["suspicion"] <= 1)).all() and (table["loss"] > 0).all()
    summary = weights_file.read_summary(weights)
    assert summary["rows"] == ROWS + 4 and summary["weighed_rows"] == ROWS and summary["classes"] == ["0", "1"]
    assert summary["suspected_rows"] == int(suspected.sum()) and summary["settings"]["alpha"] > 0
    assert not Path(f"{weights}.unfinished").exists()


def test_bad_rows_are_counted_and_listed(weights: Path) -> None:
    listed = [json.loads(line) for line in Path(f"{weights}.bad_rows.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in listed] == [ROWS + 1, ROWS + 2, ROWS + 3, ROWS + 4]
    counts = weights_file.read_summary(weights)["bad_rows"]["train"]
    assert sum(counts.values()) == 4 and counts["a label that is not among the classes of --clean"] == 1


class Page(HTMLParser):
    """Collects cells and heights of bars; every tag must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [f"{name}={value}" for name, value in attrs if name in ("src", "href")]
        if tag != "meta" and not (tag == "line" and "svg" in self.open):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_prune_keeps_the_rows_of_highest_weight(folder: Path, weights: Path, tmp_path: Path) -> None:
    assert prune(folder, weights, tmp_path) == 0
    table = read(weights)
    lines = (folder / "train.jsonl").read_bytes().splitlines(keepends=True)
    kept = (tmp_path / "kept.jsonl").read_bytes().splitlines(keepends=True)
    assert len(kept) == round(0.8 * ROWS)
    numbers = [lines.index(line) for line in kept]
    assert numbers == sorted(numbers)
    left_out = sorted(set(range(ROWS)) - set(numbers))
    assert table["weight"][numbers].min() >= table["weight"][left_out].max()

    report = Page((tmp_path / "report.html").read_text())
    assert {"svg", "rect", "table"} <= report.tags and report.links == []
    assert "script" not in report.tags and "http" not in (tmp_path / "report.html").read_text()
    texts = [json.loads(line)["text"] for line in lines[:ROWS]]
    worst, best = int(table["weight"].argmin()), int(table["weight"].argmax())
    assert texts[worst] in report.cells and texts[best] in report.cells  # with its < and > escaped
    assert report.cells.count("150") == 1 and "broken JSON" in report.cells


def test_prune_by_suspicion(folder: Path, weights: Path, tmp_path: Path) -> None:
    assert prune(folder, weights, tmp_path, "--by", "suspicion") == 0
    suspicion = read(weights)["suspicion"]
    lines = (folder / "train.jsonl").read_bytes().splitlines(keepends=True)
    kept = {lines.index(line) for line in (tmp_path / "kept.jsonl").read_bytes().splitlines(keepends=True)}
    assert len(kept) == round(0.8 * ROWS)
    assert max(suspicion[list(kept)]) <= min(suspicion[list(set(range(ROWS)) - kept)])


def test_all_rows_can_be_kept(folder: Path, weights: Path, tmp_path: Path) -> None:
    assert prune(folder, weights, tmp_path, "--keep", "1") == 0
    lines = (folder / "train.jsonl").read_bytes().splitlines(keepends=True)
    assert (tmp_path / "kept.jsonl").read_bytes() == b"".join(lines[:ROWS])


def test_formats_agree(folder: Path, weights: Path, tmp_path: Path) -> None:
    """CSV and Parquet give the weights of JSON Lines, and the three formats of weights hold the same."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    content = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()[:ROWS]]
    with open(tmp_path / "train.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerows([["class", "sentence"], *([row["label"], row["text"]] for row in content)])
    columns = {"class": [row["label"] for row in content], "sentence": [row["text"] for row in content]}
    parquet.write_table(pa.table(columns), tmp_path / "train.parquet", row_group_size=40)
    clean = [json.loads(line) for line in (folder / "dev.jsonl").read_text().splitlines()]
    renamed = [json.dumps({"class": str(row["label"]), "sentence": row["text"]}) for row in clean]
    (tmp_path / "dev.jsonl").write_text("\n".join(renamed))
    expected = read(weights)
    for name, out in (("train.csv", "weights.parquet"), ("train.parquet", "weights.csv")):
        files = ["--train", str(tmp_path / name), "--clean", str(tmp_path / "dev.jsonl")]
        status = weigh(folder, tmp_path / out, *files, "--text", "sentence", "--label", "class")
        assert status == 0
        found = read(tmp_path / out)
        for column in COLUMNS:
            torch.testing.assert_close(found[column], expected[column], rtol=1e-4, atol=1e-5)


def test_corrected_labels(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights.csv"
    assert weigh(folder, out, "--correct", "--meta-lr", "0.005") == 0
    corrected = weights_file.read(out, ["0", "1"], ["corrected_label"])["corrected_label"]
    right = corrected == torch.arange(ROWS) % 2
    assert right.float().mean() > 1 - WRONG / ROWS  # better than the given labels
    assert weights_file.read_summary(out)["corrected_rows"] > 0


def test_a_killed_run_goes_on(folder: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights.jsonl"
    files = ["--train", "train.jsonl", "--clean", "dev.jsonl", "--model", "model", "--out", str(out)]
    command = [sys.executable, "-m", "sama_experiments.own_data", "weigh", *files, *TINY, "--checkpoint-every", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    checkpoint = Path(f"{out}.unfinished") / "checkpoint.pt"
    until = time.monotonic() + 120
    while not checkpoint.is_file() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and checkpoint.is_file() and not out.exists()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "going on from the checkpoint" in done.stdout, done.stderr
    found, expected = read(out), read(weights)
    for column in COLUMNS:
        torch.testing.assert_close(found[column], expected[column], rtol=1e-3, atol=1e-4)
    assert not checkpoint.parent.exists()


def test_other_settings_do_not_go_on(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "weights.jsonl"
    unfinished = Path(f"{out}.unfinished")
    unfinished.mkdir()
    settings = {"epochs": 7, "processes": 1}
    torch.save({"settings": settings, "results": {}, "run": "weigh", "state": {}}, unfinished / "checkpoint.pt")
    assert weigh(folder, out) == 2
    assert re.search(r"^error: .*unfinished program with .*--restart to begin anew", capsys.readouterr().err)
    assert (unfinished / "checkpoint.pt").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "nowhere.csv"], "--train nowhere.csv: no such file"),
        (["--train", "train.txt"], "--train train.txt: the name must end in .jsonl"),
        (["--text", "body"], "has no such field; its fields are text, label"),
        (["--clean", "{folder}/train.jsonl"], "has the same content as --train"),
        (["--clean", "one.csv"], "--clean one.csv: only the class '1'"),
        (["--clean", "other.csv"], "has no good row (most often: a label that is not among the classes of --clean"),
        (["--out", "nowhere/weights.csv"], "--out nowhere/weights.csv: there is no folder nowhere; make it first"),
        (["--out", "weights.txt"], "--out weights.txt: the name must end in .parquet, .csv, .jsonl"),
        (["--out", "."], "--out .: is a folder"),
        (["--out", "{folder}/train.jsonl"], "is the file of --train"),
        (["--out", "taken.csv"], "taken.csv.unfinished is for checkpoints, but there is a file of this name"),
        (["--model", "nowhere"], "no model folder nowhere"),
        (["--train-layers", "9"], "--train-layers 9: the model has only 3 layers"),
    ],
)
def test_errors_of_weigh_are_one_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.csv").write_text("text,label\na,1\nb,1\n")
    Path("other.csv").write_text("text,label\na,x\nb,y\n")
    Path("taken.csv.unfinished").write_text("mine")
    assert weigh(folder, tmp_path / "weights.csv", *(part.format(folder=folder) for part in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not Path("weights.csv").exists() and not Path("weights.csv.unfinished").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "nowhere.csv"], "--weights nowhere.csv: no such file"),
        (["--weights", "{folder}/dev.jsonl"], "which `sama-kernels weigh` wrote beside it, is missing"),
        (["--train", "{folder}/dev.jsonl"], "is not the file that was weighed"),
        (["--out", "kept.csv"], "--out kept.csv: must end in .jsonl, as --train does"),
        (["--out", "{folder}/train.jsonl"], "is the file of --train"),
        (["--report", "{folder}/weights.jsonl"], "is the file of --weights"),
        (["--report", "{folder}/weights.jsonl.json"], "is what belongs to --weights"),
        (["--report", "kept.jsonl.partial"], "is the file of --out"),
        (["--report", "nowhere/report.html"], "there is no folder nowhere"),
    ],
)
def test_errors_of_prune_are_one_line(
    folder: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert prune(folder, weights, tmp_path, *(part.format(folder=folder) for part in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("end", [".bad_rows.jsonl", ""])
@pytest.mark.parametrize("flag", ["--train", "--clean"])
def test_inputs_are_not_written_over(folder: Path, tmp_path: Path, capsys: Any, flag: str, end: str) -> None:
    out = tmp_path / "weights.jsonl"
    mine = Path(f"{out}{end}")
    content = (folder / ("train.jsonl" if flag == "--train" else "dev.jsonl")).read_bytes()
    mine.write_bytes(content)
    assert weigh(folder, out, flag, str(mine)) == 2
    error = capsys.readouterr().err
    assert f"the file of {flag}" in error and ("is written beside it" in error) == bool(end)
    assert mine.read_bytes() == content and list(tmp_path.iterdir()) == [mine]


def test_a_training_that_diverges_writes_nothing(folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "weights.csv"
    assert weigh(folder, out, "--lr", "1e30") == 2
    assert re.search(r"^error: --lr 1e\+30, .*diverged .*nothing was written", capsys.readouterr().err)
    assert not out.exists() and not Path(f"{out}.json").exists()


@pytest.mark.parametrize("arguments", [["--keep", "0"], ["--keep", "1.1"], ["--keep", "nan"]])
def test_shares_are_checked(folder: Path, weights: Path, tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        prune(folder, weights, tmp_path, *arguments)


def test_highest_and_margins() -> None:
    assert highest(torch.tensor([1.0, 3.0, 2.0, 3.0, 1.0]), 0.6).tolist() == [False, True, True, True, False]
    assert highest(torch.ones(4), 0.5).tolist() == [True, True, False, False]
    assert int(highest(torch.rand(3), 0.01).sum()) == 1
    draw = torch.Generator().manual_seed(0)
    p, labels = torch.rand(50, 4, generator=draw).softmax(dim=1), torch.randint(4, (50,), generator=draw)
    expected = [max(q for j, q in enumerate(row) if j != i) - row[i] for row, i in zip(p.tolist(), labels, strict=True)]
    torch.testing.assert_close(margins(p, labels), torch.tensor(expected))


def test_the_histogram_counts_every_row() -> None:
    weights = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    kept = highest(weights, 0.7)
    svg = page.histogram(weights, kept)
    counts = {
        tip: [int(n) for n in re.findall(r"(\d+) (?:kept|left)", tip)] for tip in re.findall(r"<title>.*?</", svg)
    }
    assert [sum(c[i] for c in counts.values()) for i in (0, 1)] == [700, 300]
    assert "<rect" in page.histogram(torch.ones(5), torch.ones(5, dtype=torch.bool))  # all weights equal
