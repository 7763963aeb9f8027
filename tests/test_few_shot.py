"""The few-shot program: the network, tasks, scores, resuming, several processes, and the program to its end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from few_shot_cases import CPU, SMALL, images_of, write_omniglot
from killed import killed_and_resumed, read, undisturbed
from problems import relative_error

from sama_experiments import few_shot
from sama_experiments.few_shot.evaluation import nearest_mean_accuracy, task_accuracies
from sama_experiments.few_shot.methods import METHODS, Settings
from sama_experiments.few_shot.network import ConvNet
from sama_experiments.few_shot.options import parse
from sama_experiments.few_shot.report import Row, verdict
from sama_experiments.few_shot.tasks import draw_task, split_classes
from sama_experiments.few_shot.training import Learner

TINY = [
    "--ways", "3", "--widths", "2", "4", "--shots", "1", "2", "--meta-batch", "2", "--inner-steps", "2",
    "--queries", "1", "--test-queries", "1", "--test-tasks", "4", "--seeds", "0", "--device", "cpu",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize(("downsample", "features"), [("stride", 4), ("pool", 1)])
def test_network(downsample: str, features: int) -> None:
    net = ConvNet(5, 7, downsample=downsample)
    assert net(torch.rand(3, 1, 28, 28)).shape == (3, 7)
    assert sum(p.numel() for p in net.parameters()) == 5 * 10 + 3 * (25 * 9 + 5) + 4 * 10 + 7 * (5 * features + 1)
    assert not list(net.buffers())  # nothing but the parameters goes from task to task


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_only_batch_normalisation_lets_images_see_each_other(norm: str) -> None:
    torch.manual_seed(0)
    net = ConvNet(4, 3, norm)
    torch.nn.init.normal_(net.head.weight)
    images = torch.rand(6, 1, 28, 28)
    together, alone = net(images)[:3].detach(), net(images[:3]).detach()
    assert (relative_error(together, alone) < 1e-5) == (norm == "group")


def test_draw_task() -> None:
    """Labels count from 0; of a class no image is in both sets; every image is where its label says."""
    images = torch.arange(5 * 6).view(5, 6, 1, 1).expand(5, 6, 28, 28).to(torch.uint8)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(20):
        task = draw_task(images, 4, 2, 3, generator, CPU)
        support, query = ((255 * x[:, 0, 0, 0]).round().long() for x in (task.support, task.query))
        assert task.support.shape == (8, 1, 28, 28) and task.query.shape == (12, 1, 28, 28)
        assert len(set(support.tolist()) | set(query.tolist())) == 20
        classes = (support // 6)[::2]
        assert torch.equal(classes[task.support_labels], support // 6)
        assert torch.equal(classes[task.query_labels], query // 6)
        seen.add(tuple(classes.tolist()))
    assert len(seen) > 10


def test_split_classes() -> None:
    images = torch.arange(40).view(40, 1, 1, 1)
    splits = split_classes(images, (0.5, 0.2), 3)
    assert {name: len(part) for name, part in splits.items()} == {"train": 20, "validation": 8, "test": 12}
    assert torch.cat(list(splits.values())).flatten().sort().values.tolist() == list(range(40))
    assert splits["train"].flatten().tolist() != list(range(20))


def test_scores_against_a_loop() -> None:
    """Both accuracies, with everything written out image by image, on the tasks that the seed stands for."""
    images, settings = images_of(), replace(SMALL, test_queries=3)
    learner = Learner(2, METHODS["scratch"], settings, 0, CPU)
    found = task_accuracies(learner, images, 2, seed=5)
    generator = torch.Generator().manual_seed(1_000_005)
    shares, pixels = [], []
    for _ in range(settings.test_tasks):
        task = draw_task(images, 3, 2, 3, generator, CPU)
        learner.adapt(task, settings.inner_steps)
        logits = learner.net(task.query)
        shares.append(sum(int(row.argmax() == label) for row, label in zip(logits, task.query_labels, strict=True)) / 9)
        right = 0
        for image, label in zip(task.query, task.query_labels, strict=True):
            distances = [(image - task.support[task.support_labels == c].mean(dim=0)).norm().item() for c in range(3)]
            right += distances.index(min(distances)) == label
        pixels.append(right / 9)
    assert torch.allclose(found, torch.tensor(shares))
    assert nearest_mean_accuracy(images, settings, 2, seed=5) == pytest.approx(sum(pixels) / 4)


def test_verdict_follows_the_figures() -> None:
    def row(width: int, accuracies: list[float]) -> Row:
        mean = sum(accuracies) / len(accuracies)
        return Row(1, "sama", "SAMA", width, 10, mean, 0.0, 0.01, accuracies, 1.0, 0)

    good = [row(8, [0.3, 0.4]), row(16, [0.5, 0.5]), row(32, [0.6, 0.6])]
    assert "confirmed, for every seed" in verdict(good, "sama", 1)
    assert "8 to 16: +15.0 (+20.0, +10.0)" in verdict(good, "sama", 1) and "in all +25.0" in verdict(good, "sama", 1)
    assert "in the mean over seeds" in verdict([row(8, [0.3, 0.5]), row(16, [0.6, 0.45])], "sama", 1)
    assert "NOT confirmed: 1 of 2" in verdict([*good[:2], row(32, [0.4, 0.4])], "sama", 1)
    assert "NOT confirmed: 0 of 1" in verdict([row(8, [0.4]), row(16, [0.405])], "sama", 1)  # within the tasks' noise
    assert "one width" in verdict(good[:1], "sama", 1)


def test_paper_and_quick_change_defaults_that_flags_override() -> None:
    paper = parse(["--paper", "--meta-steps", "7"])
    assert (paper.settings.strength, paper.settings.inner_steps, paper.settings.meta_batch) == (2.0, 25, 16)
    assert paper.settings.meta_steps == 7 and paper.settings.queries is None and 64 in paper.widths
    quick = parse(["--quick", "--ways", "4"])
    assert quick.settings.ways == 4 and quick.widths == [8, 32] and parse([]).settings == Settings()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small data set that is read faster than the fonts are drawn."""
    return str(write_omniglot(tmp_path_factory.mktemp("omniglot")))


def start(out: Path, *more: str) -> dict[str, Any]:
    assert few_shot.main([*TINY, "--out", str(out), *more]) == 0
    return json.loads((out / "few_shot.json").read_text())


def test_whole_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = start(tmp_path, "--meta-steps", "3", "--seeds", "0", "1")
    printed = capsys.readouterr().out
    assert (tmp_path / "few_shot.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "checkpoint.pt").exists()
    assert len(result["runs"]) == 2 * 2 * 2 * 3 and len(result["table"]) == 2 * 2 * 3
    for row in result["table"]:
        assert row["accuracy_mean"] == pytest.approx(sum(row["accuracies"]) / 2) and len(row["accuracies"]) == 2
    for run in result["runs"]:
        assert len(run["losses"]) == (0 if run["method"] == "scratch" else 3)
    assert result["versions"]["matplotlib"] and set(result["nearest_mean_of_pixels"]) == {"1", "2"}
    assert "3-way 1-shot" in printed and "nearest mean of pixels" in printed and "consistent" in printed
    listed = subprocess.run([sys.executable, "-m", "sama_experiments"], env=ENVIRONMENT, capture_output=True, text=True)
    assert "few_shot" in listed.stdout


def test_resumes_after_a_kill(tmp_path: Path, folder: str) -> None:
    """Killed within a run: started again it goes on, and finds what an undisturbed program finds."""
    arguments = [*TINY, "--data", folder, "--meta-steps", "60", "--methods", "sama", "--shots", "1", "--widths", "2"]
    killed_and_resumed("sama_experiments.few_shot", arguments, tmp_path / "cut")
    undisturbed("sama_experiments.few_shot", arguments, tmp_path / "whole")
    cut, whole = (read(tmp_path / name / "few_shot.json")["runs"][0] for name in ("cut", "whole"))
    assert {**cut, "seconds": 0, "losses": 0} == {**whole, "seconds": 0, "losses": 0}
    assert len(whole["losses"]) == 60 and cut["losses"] == pytest.approx(whole["losses"], abs=2e-4)


def test_two_processes_find_the_same(tmp_path: Path, folder: str) -> None:
    """Meta batches of 3 tasks: the processes have 2 and 1."""
    options = ["--data", folder, "--meta-batch", "3", "--meta-steps", "3", "--widths", "2", "--shots", "1"]
    alone = start(tmp_path / "alone", *options)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "sama_experiments.few_shot", *TINY, *options, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    both = json.loads((tmp_path / "two" / "few_shot.json").read_text())
    assert both["processes"] == 2 and done.stdout.count("wrote") == 1
    for found, expected in zip(both["runs"], alone["runs"], strict=True):
        assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-6)
        assert found["losses"] == pytest.approx(expected["losses"], abs=2e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "FOLDER", "--ways", "9"], "--ways 9: the validation split of Omniglot has only 8 classes"),
        (
            ["--data", "FOLDER", "--shots", "3"],
            "--shots and queries ask for 4 images of a class, Omniglot has 3 of each",
        ),
        (["--rotations"], "--rotations is for --data"),
        (["--data", "/nowhere"], "--data: no folder /nowhere/images_background"),
        (["--out", "/dev/null/x"], "--out /dev/null/x"),
        (["--widths", "0"], "--widths"),
        (["--damping", "-1"], "--damping"),
        (["--paper", "--quick"], "not allowed with"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [folder if argument == "FOLDER" else argument for argument in arguments]
    try:
        status = few_shot.main([*TINY, "--out", str(tmp_path), *given])
    except SystemExit as exit_:  # argparse
        status = int(exit_.code or 0)
    printed = capsys.readouterr().err
    assert status == 2 and message in printed and "Traceback" not in printed


def test_finished_runs_are_kept(
    tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a stop: with other settings an error, with the same ones the results without any training."""
    options = ["--data", folder, "--meta-steps", "2", "--widths", "2", "--shots", "1"]

    def stop(*_: Any) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("sama_experiments.few_shot.program.nearest_mean_accuracy", stop)
        few_shot.main([*TINY, *options, "--out", str(tmp_path)])
    assert few_shot.main([*TINY, *options, "--out", str(tmp_path), "--strength", "0.3"]) == 2
    assert "checkpoint.pt is of an unfinished program" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr("sama_experiments.few_shot.program.run", stop)
        assert len(start(tmp_path, *options)["runs"]) == 3
    assert "going on from" in capsys.readouterr().out
