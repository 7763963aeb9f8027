"""The noisy-finetuning program on two processes is the same experiment as on one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_bert import make_tiny_bert

from sama_experiments import noisy_finetuning
from sama_experiments.common import processes
from sama_experiments.common.encoder import PretrainedEncoder
from sama_experiments.common.errors import ExperimentError
from sama_experiments.data import load_reviews
from sama_experiments.noisy_finetuning.experiment import Experiment
from sama_experiments.noisy_finetuning.methods import METHODS
from sama_experiments.noisy_finetuning.options import parse
from sama_experiments.noisy_finetuning.training import Trainer

PROGRAM = "sama_experiments.noisy_finetuning"
# Batches of 5 and 7: the parts of two, three and four processes differ in size.
TINY = [
    "--limit", "200", "--clean", "20", "--steps", "8", "--clean-steps", "4", "--meta-start", "2", "--batch", "5",
    "--meta-batch", "7", "--clean-batch", "5", "--seeds", "0", "--device", "cpu",
]  # fmt: skip
METHODS_RUN = ["--methods", "weak", "sama-rc-clean"]
LAUNCHERS = {  # followed by the number of processes
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"],
    # accelerate starts several processes on a machine without GPUs only if it is told that there are some
    "accelerate": [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--main_process_port",
        "0",
        "--num_processes",
    ],
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("no_dropout"), dropout=0.0)


@pytest.fixture(scope="module")
def alone(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("alone")
    assert noisy_finetuning.main(["--model", str(model_folder), "--out", str(out), *TINY, *METHODS_RUN]) == 0
    return json.loads((out / "noisy_finetuning.json").read_text())


@pytest.mark.parametrize(
    ("launcher", "world"), [("torchrun", 2), ("torchrun", 3), ("accelerate", 2), ("accelerate", 4)]
)
def test_the_program_finds_the_same_on_several_processes(
    alone: dict[str, Any], model_folder: Path, tmp_path: Path, launcher: str, world: int
) -> None:
    command = [sys.executable, *LAUNCHERS[launcher], str(world), "-m", PROGRAM, *TINY, *METHODS_RUN]
    command += ["--model", str(model_folder), "--out", str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "noisy_finetuning.json").read_text())
    assert (tmp_path / "noisy_finetuning.png").is_file()
    assert result["processes"] == world and alone["processes"] == 1 and result["options"]["settings"]["sync"] == "full"
    assert result["linear_probe_accuracy"] == alone["linear_probe_accuracy"]
    for got, expected in zip(result["runs"], alone["runs"], strict=True):
        for key in ("method", "seed", "accuracy", "curve", "steps", "degenerate_meta_steps"):
            assert got[key] == expected[key]
        assert got["base_norm"] == pytest.approx(expected["base_norm"], rel=1e-6)
        assert got.get("learned", {}) == pytest.approx(expected.get("learned", {}), rel=1e-5)
    for line in ("finetune on weak labels, seed 0:", f"{world} processes: throughput", "For scale:", "wrote "):
        assert done.stdout.count(line) == 1


class Silent:
    def stage(self, title: str, total: int) -> None: ...
    def advance(self, units: int = 1) -> None: ...


CASES = {
    "weak": ["weak"],
    "weak and clean": ["pooled"],
    "stages": ["weak-clean"],
    "R & C": ["sama-rc"],
    "R & C, clean too": ["sama-rc", "--clean-in-base", "--clean-weight", "0.3", "--no-update-base"],
    "final, update": ["sama-r", "--sync", "final"],
}
FINAL = ["sama-rc", "--sync", "final", "--no-update-base"]


def all_cases(rank: int, world: int, folder: Path) -> dict[str, dict[str, Any]]:
    """By case: the weights of this process, all in float64, after 8 steps, and its random numbers before them."""
    torch.set_default_dtype(torch.float64)
    encoder = PretrainedEncoder(folder, None, 12, torch.device("cpu"))
    encoder.model.double()
    encoder.trained.double()
    experiment = Experiment(load_reviews(200), encoder, parse(TINY).settings, "test", Silent())
    experiment.evidence.weak_targets = experiment.evidence.weak_targets.double()
    found = {}
    for name, (method, *more) in {**CASES, "final": FINAL}.items():
        trainer = Trainer(experiment.task(0), METHODS[method], parse([*TINY, *more]).settings, seed=0)
        drawn = torch.rand(4)
        for _ in range(trainer.steps):
            trainer.step()
        weights = [*trainer.model.parameters(), *(trainer.learners.parameters() if trainer.learners else ())]
        found[name] = {"weights": torch.cat([p.detach().flatten() for p in weights]), "drawn": drawn}
    torch.set_default_dtype(torch.float32)
    return found


@pytest.mark.parametrize("world", [2, 3, 4])
def test_weights_are_those_of_one_process(model_folder: Path, world: int) -> None:
    """In float64, where the only difference left is the order of sums."""
    expected = all_cases(0, 1, model_folder)
    first, *others = run_ranks(world, all_cases, model_folder)
    for name in first:
        assert torch.equal(first[name]["drawn"], expected[name]["drawn"])
        for other in others:
            assert torch.equal(first[name]["weights"], other[name]["weights"])
            assert (first[name]["drawn"] != other[name]["drawn"]).all()  # other dropout masks
    for name in CASES:
        torch.testing.assert_close(first[name]["weights"], expected[name]["weights"], rtol=1e-9, atol=1e-11)
    assert (first["final"]["weights"] - expected["final"]["weights"]).abs().max() > 1e-6  # each rank has its own v


def run_without_launcher(arguments: list[list[str]]) -> tuple[list[int], list[str]]:
    """One process for each list of arguments, with the variables that launchers set; exit statuses and stderrs.

    A launcher would end the other processes when one has failed; here each has to end by itself.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    started = []
    for rank, more in enumerate(arguments):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(arguments))}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", PROGRAM, *TINY, *more],
                env={**ENVIRONMENT, **variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], errors


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--sync", "half"], "argument --sync: invalid choice"),
        (["--model", "nowhere"], "error: no model folder nowhere"),
    ],
)
def test_an_error_of_all_is_printed_once(bad: list[str], message: str, tmp_path: Path) -> None:
    statuses, errors = run_without_launcher([["--out", str(tmp_path), *bad]] * 2)
    assert statuses == [2, 2]
    assert sum(error.count(message) for error in errors) == 1
    assert "Traceback" not in "".join(errors)


def test_an_error_of_one_ends_the_others(model_folder: Path, tmp_path: Path) -> None:
    good = ["--model", str(model_folder), "--out", str(tmp_path)]
    statuses, errors = run_without_launcher([good, [*good, "--model", "nowhere"]])
    assert statuses == [1, 2]
    assert "error: no model folder nowhere" in errors[1]


def test_batches_hold_a_sample_for_each_process(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> None:
    monkeypatch.setattr(processes, "world", lambda: 6)  # --batch and --clean-batch are 5
    encoder = PretrainedEncoder(model_folder, 1, 12, torch.device("cpu"))
    with pytest.raises(ExperimentError, match=r"^6 processes: --batch, --clean-batch, --meta-batch and --clean must"):
        Experiment(load_reviews(200), encoder, parse(TINY).settings, "test", Silent())


def test_no_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "world", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ExperimentError, match=r"^4 processes here, but PyTorch sees 2 GPU\(s\)"):
        processes.gpu()
