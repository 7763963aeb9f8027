"""Baselines, other algorithms, weighted votes and resuming of the noisy-finetuning program."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import killed_and_resumed, read, undisturbed
from test_noisy_finetuning import TINY
from tiny_bert import make_tiny_bert

from sama_experiments import noisy_finetuning
from sama_experiments.common.checkpoints import Checkpoint
from sama_experiments.data import ABSTAIN, majority_vote
from sama_experiments.noisy_finetuning import cosine, paper
from sama_experiments.noisy_finetuning.methods import ALGORITHMS, METHODS, keys_of
from sama_experiments.noisy_finetuning.options import parse


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = make_tiny_bert(tmp_path_factory.mktemp("tiny_bert"), dropout=0.1)
    return folder


def run(model_folder: Path, out: Path, *more: str) -> Any:
    assert noisy_finetuning.main(["--model", str(model_folder), "--out", str(out), *TINY, "--seeds", "0", *more]) == 0
    return json.loads((out / "noisy_finetuning.json").read_text())


def test_every_algorithm_learns(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """R & C by each: the learned weights move away from 1, each algorithm elsewhere."""
    names = ["sama", "sama_na", *ALGORITHMS]
    result = run(model_folder, tmp_path, "--algorithm", *names, "--inner-terms", "2")
    keys = [key for name in names for key in keys_of(name)]
    assert [row["method"] for row in result["table"]] == ["weak", *keys] == result["options"]["methods"]
    learned = [run["learned"]["mean_weight_where_weak_label_is_right"] for run in result["runs"][1:]]
    assert all(math.isfinite(x) and x != 1 for x in learned) and len({round(x, 7) for x in learned}) > 12
    assert all(run["degenerate_meta_steps"] == 0 for run in result["runs"])
    assert "80.25" in capsys.readouterr().out  # iterative differentiation on IMDB, Table 9


def test_algorithms_do_not_mix_with_clean_samples(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(model_folder), "--out", str(tmp_path), *TINY, "--algorithm", "neumann"]
    assert noisy_finetuning.main([*arguments, "--clean-in-base"]) == 2
    assert "--clean-in-base: neumann-r differentiates the weak loss alone" in capsys.readouterr().err


def test_cosine_formulas() -> None:
    torch.manual_seed(3)
    p = torch.rand(6, 3).softmax(1)
    labels = cosine.soft_labels(p)
    for i in range(6):
        row = torch.tensor([p[i, j] ** 2 / sum(p[k, j] for k in range(6)) for j in range(3)])
        torch.testing.assert_close(labels[i], row / row.sum())
    hand = torch.tensor([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0.0]])
    expected = torch.tensor([1.0, 0.0, 1 - math.log(2) / math.log(3)])
    torch.testing.assert_close(cosine.confidence(hand), expected, atol=1e-6, rtol=0)
    features, total = torch.randn(6, 4), 0.0
    for i in range(6):
        for j in range(6):
            d = float((features[i] - features[j]).square().sum()) / 4
            alike = labels[i].argmax() == labels[j].argmax()
            total += d**2 if alike else max(0.0, cosine.MARGIN - d) ** 2
    assert float(cosine.contrast(features, labels)) == pytest.approx(total / 36, rel=1e-5)


def test_cosine_loss_takes_the_sure_texts_alone() -> None:
    torch.manual_seed(4)
    teacher = torch.tensor([[0.98, 0.02], [0.55, 0.45], [0.03, 0.97]])
    logits, features = torch.randn(3, 2, requires_grad=True), torch.randn(3, 4)
    loss = cosine.cosine_loss(logits, features, teacher)
    (grad,) = torch.autograd.grad(loss, logits)
    assert (grad[1] == 0).all() and (grad[[0, 2]] != 0).all()
    y = cosine.soft_labels(teacher)[[0, 2]]
    log_p, w = logits[[0, 2]].log_softmax(1), cosine.confidence(y)
    fitted = (w * (y * (y.log() - log_p)).sum(1)).mean()
    uniform = (0.5 * (math.log(0.5) - log_p)).sum(1).mean()
    torch.testing.assert_close(loss, fitted + cosine.contrast(features[[0, 2]], y) + 0.1 * uniform)
    assert cosine.cosine_loss(logits, features, torch.full((3, 2), 0.5)) == 0


def test_cosine_runs_and_differs_from_finetuning(model_folder: Path, tmp_path: Path) -> None:
    result = run(model_folder, tmp_path, "--methods", "weak", "cosine", "--steps", "30")
    weak, trained = result["runs"]
    assert trained["method"] == "cosine" and trained["base_norm"] != weak["base_norm"]


LONGER = ["--steps", "60", "--seeds", "1", "--unroll", "4", "--inner-terms", "2"]


def same_numbers(whole: Path, cut: Path) -> None:
    runs = (read(folder / "noisy_finetuning.json")["runs"] for folder in (whole, cut))
    for a, b in zip(*runs, strict=True):
        assert (a["accuracy"], a["curve"], a["steps"]) == (b["accuracy"], b["curve"], b["steps"])
        assert a["base_norm"] == pytest.approx(b["base_norm"], rel=1e-5)


def test_resumes_after_a_kill(model_folder: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(model_folder), *TINY, *LONGER, "--methods", "sama-rc-clean", "weak"]
    undisturbed("sama_experiments.noisy_finetuning", arguments, tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    killed_and_resumed("sama_experiments.noisy_finetuning", arguments, tmp_path / "cut")
    same_numbers(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("method", ["sama-rc-clean", "cosine", "iterative-r"])
def test_every_stage_resumes(model_folder: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted at the second checkpoint: after 50 of 60 steps, in the second stage of those that have two."""
    run(model_folder, tmp_path / "whole", *LONGER, "--methods", method)
    save, saved = Checkpoint.save, []

    def interrupted(self: Checkpoint, key: str, state: Any) -> None:
        save(self, key, state)
        saved.append(key)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model_folder, tmp_path / "cut", *LONGER, "--methods", method)
    monkeypatch.setattr(Checkpoint, "save", save)
    run(model_folder, tmp_path / "cut", *LONGER, "--methods", method)
    same_numbers(tmp_path / "whole", tmp_path / "cut")


def test_weighted_votes_count_by_the_share_of_their_class() -> None:
    votes = torch.tensor([[0, 0, 1], [0, 1, 1], [2, ABSTAIN, ABSTAIN], [0, 1, 2], [ABSTAIN] * 3])
    assert majority_vote(votes, 3, weights=torch.tensor([0.2, 0.5, 0.3])).tolist() == [1, 1, 2, 1, ABSTAIN]
    assert majority_vote(votes, 3).tolist() == [0, 1, 2, ABSTAIN, ABSTAIN]


def test_weighted_votes_are_for_folders(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert noisy_finetuning.main(["--model", str(model_folder), "--out", str(tmp_path), "--vote", "weighted"]) == 2
    assert "--vote weighted is for --data" in capsys.readouterr().err


def test_paper_figures() -> None:
    assert paper.nearest("movie reviews") == "imdb" and paper.nearest("AGNews_processed") == "agnews"
    assert paper.accuracy("trec", "sama-rc") == 87.93 and paper.accuracy("yelp", "sama-na-rc") == 80.73
    assert paper.accuracy("agnews", "neumann-r") == 86.65 and paper.accuracy("imdb", "neumann-r") == 79.92
    assert paper.accuracy("trec", "neumann-r") is None and paper.accuracy("imdb", "clean") is None
    assert {*paper._TABLE_1, *paper._TABLES_8_9} <= METHODS.keys()


def test_options_of_algorithms() -> None:
    assert parse(["--algorithm", "t1_t2"]).methods == ["weak", "t1-t2-r", "t1-t2-rc"]
    assert parse(["--paper", "--algorithm", "sama"]).methods == ["weak", "sama-r", "sama-rc"]
    assert parse(["--algorithm", "sama", "--methods", "clean"]).methods == ["clean"]
    assert parse([]).kept() == parse(["--out", "elsewhere", "--restart"]).kept() != parse(["--steps", "7"]).kept()
