"""The data-pruning program from end to end, on a few digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import killed_and_resumed, read
from test_data_pruning_data import write_cifar, write_images
from test_data_pruning_scores import tiny
from torch import nn

from sama_experiments import data_pruning
from sama_experiments.common.checkpoints import Checkpoint
from sama_experiments.data_pruning import datasets, dynams, training
from sama_experiments.data_pruning.dynams import DynamsTraining
from sama_experiments.data_pruning.experiment import Experiment
from sama_experiments.data_pruning.methods import METHODS, Settings
from sama_experiments.data_pruning.models import Classifier
from sama_experiments.data_pruning.options import check, parse
from sama_experiments.data_pruning.sama import SamaSearch
from sama_experiments.data_pruning.training import FullTraining, Trainer

TINY = ["--limit", "150", "--epochs", "3", "--search-epochs", "3", "--averaged-epochs", "2", "--early-models", "2"]
TINY += ["--early-epochs", "1", "--ratios", "0.2", "0.5", "--batch", "32"]


class Quiet:
    def stage(self, title: str, total: int) -> None: ...
    def advance(self, units: int = 1) -> None: ...


def run(out: Path, *more: str) -> dict[str, Any]:
    assert data_pruning.main(["--out", str(out), *TINY, *more]) == 0
    content: dict[str, Any] = json.loads((out / "data_pruning.json").read_text())
    return content


def test_whole_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, "--seeds", "0", "1")
    cells = {(row["method"], row["ratio"]): row for row in result["table"]}
    assert set(cells) == {(method, ratio) for method in METHODS for ratio in (0.2, 0.5)}
    assert len(result["runs"]) == 32 and all(0 <= r["accuracy"] <= 1 for r in result["runs"])
    assert result["data"] == {
        "name": "MNIST-5k", "train": 132, "scored": 30, "classes": 10, "wrong_labels": 24, "copies": 12,
    }  # fmt: skip
    for (method, ratio), row in cells.items():
        own = [r for r in result["runs"] if (r["method"], r["ratio"]) == (method, ratio)]
        assert [r["seed"] for r in own] == [0, 1]
        assert row["accuracy_mean"] == pytest.approx((own[0]["accuracy"] + own[1]["accuracy"]) / 2)
        assert row["samples_seen"] == pytest.approx(1 - ratio, abs=0.01)
        assert 0 <= row["wrong_found"] <= 1 and row["pairs_reduced"] >= row["pairs_lost"]
    assert cells["oracle", 0.2]["wrong_found"] == 1 and cells["oracle", 0.2]["pairs_lost"] == 0
    assert cells["oracle", 0.5]["pairs_reduced"] == 1
    assert cells["random", 0.2]["search_time"] == cells["oracle", 0.2]["search_time"] == 0
    assert cells["forgetting", 0.2]["search_time"] == cells["margin", 0.5]["search_time"] == 1
    assert cells["sama", 0.2]["search_time"] > 1 > cells["dynams", 0.2]["search_time"] > 0
    assert {(s["source"], s["seed"]) for s in result["searches"]} == {
        (source, seed) for source in ("full", "early", "sama", "truth") for seed in (0, 1)
    }
    assert all(s["degenerate"] == 0 for s in result["searches"]) and result["versions"]["torch"] == torch.__version__
    heuristics = [key for key in METHODS if key not in ("sama", "oracle")]
    for ratio, line in zip((0.2, 0.5), result["verdicts"], strict=False):
        best = max(cells[key, ratio]["accuracy_mean"] for key in heuristics)
        lead = 100 * (cells["sama", ratio]["accuracy_mean"] - best)
        assert line.startswith(f"{100 * ratio:g} % pruned: SAMA {lead:+.2f} points against the best other")
    assert (tmp_path / "data_pruning.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "50 % pruned" in printed and "wrong labels among the pruned" in printed and "comparable" in printed
    assert not (tmp_path / "checkpoint.pt").exists()


def test_same_seed_same_result(tmp_path: Path) -> None:
    one, two = (run(tmp_path / name, "--methods", "sama", "--seeds", "5") for name in "ab")
    assert [r["accuracy"] for r in one["runs"]] == [r["accuracy"] for r in two["runs"]]
    assert [r["wrong_found"] for r in one["runs"]] == [r["wrong_found"] for r in two["runs"]]


def test_a_killed_program_goes_on(tmp_path: Path) -> None:
    arguments = [*TINY, "--seeds", "3", "--methods", "el2n", "dynams", "sama"]
    killed_and_resumed("sama_experiments.data_pruning", arguments, tmp_path / "cut")
    whole = run(tmp_path / "whole", "--seeds", "3", "--methods", "el2n", "dynams", "sama")
    found = read(tmp_path / "cut" / "data_pruning.json")
    for name in ("accuracy", "wrong_found", "pairs_lost"):
        assert [r[name] for r in found["runs"]] == [r[name] for r in whole["runs"]]


@pytest.mark.parametrize("kind", ["plain", "full", "dynams", "sama"])
def test_every_training_resumes_after_every_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def small_model(*_: Any, width: float = 1.0) -> Classifier:
        n = round(8 * width)
        layers = [nn.Conv2d(1, n, 3), nn.BatchNorm2d(n), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
        return Classifier(nn.Sequential(*layers), 4 * n, 3)

    for module in (training, dynams):
        monkeypatch.setattr(module, "new_model", small_model)
    data = tiny()
    settings = Settings(epochs=3, batch_size=16, search_epochs=3, averaged_epochs=2)

    def fresh() -> Trainer:
        if kind == "dynams":
            return DynamsTraining(data, settings, 0, 0.3)
        if kind == "plain":
            return Trainer(data, settings, 0, settings.epochs, torch.arange(5, 35))
        return FullTraining(data, settings, 0) if kind == "full" else SamaSearch(data, settings, 0)

    whole = fresh()
    for _ in range(whole.epochs):
        whole.run_epoch()
    broken = fresh()
    for epoch in range(broken.epochs):
        broken.run_epoch()
        torch.save(broken.state(), tmp_path / "state.pt")
        broken = fresh()
        broken.resume(torch.load(tmp_path / "state.pt", weights_only=True))
        assert broken.epoch == epoch + 1 and broken.seconds > 0
    for a, b in zip(whole.model.parameters(), broken.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert torch.equal(whole.rows, broken.rows)
    if isinstance(whole, FullTraining) and isinstance(broken, FullTraining):
        assert torch.equal(whole.forgetting.scores(), broken.forgetting.scores())
    if isinstance(whole, SamaSearch) and isinstance(broken, SamaSearch):
        torch.testing.assert_close(whole.scores(), broken.scores())
        assert whole.scores().std() > 0 and whole.steps == broken.steps


def test_methods_prune_by_their_own_scores(tmp_path: Path) -> None:
    options = parse([*TINY, "--seeds", "0"])
    data = datasets.load(options, 0, torch.device("cpu"))
    checkpoint = Checkpoint(tmp_path, {})
    experiment = Experiment(data, options, 0, checkpoint, Quiet())
    searches = experiment.searches(list(METHODS.values()))
    for key, method in METHODS.items():
        trainer, seconds = experiment._trainer(method, 0.5, searches)
        if method.source in ("draw", None):
            assert seconds == 0
            continue
        values = searches[method.source].scores[key]
        pruned = torch.ones(len(values), dtype=torch.bool)
        pruned[trainer.rows] = False
        assert values[pruned].max() <= values[trainer.rows].min() and pruned.sum() == 66
        assert seconds == searches[method.source].seconds
    # EL2N again, without the searches: two models of one epoch
    expected = torch.zeros(132)
    for number in (1, 2):
        model = Trainer(data, options.settings, number, 1)
        model.run_epoch()
        share = model.model(data.train.batch(torch.arange(132), None)).softmax(dim=1).detach()
        share[torch.arange(132), data.train.labels] -= 1
        expected += share.square().sum(dim=1).sqrt() / 2
    torch.testing.assert_close(searches["early"].scores["el2n"], expected, atol=1e-5, rtol=1e-4)


def test_papers_setups() -> None:
    cifar = parse(["--paper", "cifar10", "--data", "x", "--lr", "0.3"])
    assert (cifar.settings.model, cifar.settings.epochs, cifar.settings.search_epochs) == ("resnet18", 200, 50)
    assert (cifar.settings.batch_size, cifar.settings.weight_decay, cifar.settings.lr) == (128, 5e-4, 0.3)
    imagenet = parse(["--paper", "imagenet", "--data", "x"]).settings
    assert (imagenet.model, imagenet.epochs, imagenet.search_epochs, imagenet.batch_size) == ("resnet50", 120, 30, 256)
    assert (imagenet.meta_lr, imagenet.alpha, imagenet.unroll, imagenet.weight_decay) == (1e-5, 1.0, 2, 1e-4)
    assert imagenet.search_lr == imagenet.lr == 0.1 and imagenet.averaged_epochs == 5 and imagenet.schedule == "steps"
    for name in ("cifar10", "imagenet"):
        check(parse(["--paper", name, "--data", "x"]))
    assert "oracle" not in parse(["--data", "x"]).methods and parse(["--data", "x"]).noise == 0


def test_paper_preset_on_cifar_files(tmp_path: Path) -> None:
    write_cifar(tmp_path, binary=True)
    arguments = ["--paper", "cifar10", "--data", str(tmp_path), "--limit", "20", "--seeds", "0", "--ratios", "0.5"]
    arguments += ["--epochs", "1", "--search-epochs", "1", "--averaged-epochs", "1"]
    arguments += ["--batch", "10", "--methods", "random", "sama", "--model", "cnn"]
    assert data_pruning.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "data_pruning.json").read_text())
    assert result["data"]["name"] == "CIFAR-10" and result["table"][1]["wrong_found"] is None
    assert result["options"]["settings"]["alpha"] == 1.0 and result["options"]["paper"] == "cifar10"
    search = next(s for s in result["searches"] if s["source"] == "sama")
    assert search["degenerate"] == 0 and search["norm"] > 1


def test_image_folder_run(tmp_path: Path) -> None:
    write_images(tmp_path, each=12)
    arguments = ["--data", str(tmp_path), "--image-size", "16", "--seeds", "0", *TINY, "--limit", "20"]
    assert data_pruning.main([*arguments, "--methods", "random", "dynams", "sama", "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "data_pruning.json").read_text())
    assert result["data"]["train"] == 20 and result["data"]["scored"] == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "--data nowhere: no such folder"),
        (["--paper", "imagenet"], "--paper imagenet needs the data set: name its folder with --data"),
        (["--noise", "0.8", "--duplicates", "0.4"], "are together more than 1"),
        (["--noise", "0", "--duplicates", "0", "--methods", "oracle"], "--methods oracle: nothing is known"),
        (["--averaged-epochs", "9", "--search-epochs", "3"], "--averaged-epochs 9: more than --search-epochs 3"),
        (["--dynams-warmup", "5"], "--dynams-warmup 5: with 0.5 pruned"),
        (["--out", "taken"], "--out taken: "),
        (["--limit", "9"], "--limit 9: "),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    assert data_pruning.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_bad_numbers_are_refused_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    bad = (["--ratios", "1"], ["--ratios", "0"], ["--noise", "1"], ["--epochs", "0"], ["--alpha", "0"])
    for arguments in (*bad, ["--dynams-proxy", "0"], ["--dynams-proxy", "1.1"]):
        with pytest.raises(SystemExit):
            parse(arguments)
        assert "must be" in capsys.readouterr().err
