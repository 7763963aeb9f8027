"""`bench.algorithms`: it runs end to end, its figures are what they claim to be, and its table renders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import algorithm_table, algorithms
from bench.algorithm_cases import ATTENTION, OURS, Case, Task, compare, gradient, ours
from bench.measure import installed
from bench.peers import MODULES
from sama_kernels.algorithms import T1T2, ConjugateGradient
from sama_kernels.algorithms.options import NAMES

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a --quick run."""
    folder = tmp_path_factory.mktemp("algorithms")
    assert algorithms.main(["--quick", "--out", str(folder)]) == 0
    return folder


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_quick_run_measures_every_algorithm(quick: Path) -> None:
    about, *rows = records(quick, "algorithms_toy_2x4_cpu.jsonl")
    assert about["attention"] == "eager" and isinstance(about["disturbed"], bool) and about["settings"]["quick"]
    assert {"commit", "versions", "load", "processor"} <= about["machine"].keys()
    assert about["missing_peers"] or any(row["record"] == "agreement" for row in rows)
    figures = [row for row in rows if row["record"] == "algorithm"]
    for unroll in (10, 1):
        mine = {row["name"]: row for row in figures if row["unroll"] == unroll and row["source"] == OURS}
        assert set(NAMES) <= set(mine)
        plain = next(r for r in figures if r["unroll"] == unroll and r["source"] == "torch")
        assert plain["throughput_of_plain"][0] == plain["memory_of_plain"] == 1.0
        for row in mine.values():
            median, low, high = row["samples_per_s"]
            assert 0 < low <= median <= high and row["rounds"] == 2 and row["live_bytes"] >= plain["live_bytes"]
    ten, one = ({r["name"]: r for r in figures if r["unroll"] == u and r["source"] == OURS} for u in (10, 1))
    assert ten["iterative"]["live_bytes"] > 2 * one["iterative"]["live_bytes"]  # ten steps' graphs, one model
    assert ten["iterative, checkpoint"]["live_bytes"] < ten["iterative"]["live_bytes"]
    assert one["neumann"]["live_bytes"] > one["sama"]["live_bytes"]


def test_tables_and_plots_are_written(quick: Path) -> None:
    text = (quick / "algorithms_toy_2x4_cpu.md").read_text()
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| algorithm")]
    assert len(tables) == 2
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1 and len(lines) >= 2 + 1 + len(NAMES)
    assert "0.80, 0.81 | 1.43, 1.64 | 142.0, 14.3" in text  # SAMA: 134.56 / 169.16, 116.94 / 144.39
    assert "V100" in text and "eager attention" in text
    assert (quick / "algorithms_toy_2x4_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_ladder(tmp_path: Path) -> None:
    assert algorithms.main(["--ladder", "--quick", "--out", str(tmp_path)]) == 0
    _, *rows = records(tmp_path, "ladder_cpu.jsonl")
    assert {row["name"] for row in rows} == {"plain finetuning", *NAMES}
    small, large = sorted({row["parameters"] for row in rows})
    live = {(row["name"], row["parameters"]): row["live_bytes"] for row in rows}
    for name in NAMES:
        assert live[name, large] > live[name, small]
    assert live["conjugate_gradient", large] - live["sama", large] > 4 * large  # its vectors, 4 bytes an element
    assert (tmp_path / "ladder_cpu.md").read_text().count("\n| `") == 1 + len(NAMES)
    assert (tmp_path / "ladder_cpu.png").is_file()


def test_a_period_is_charged_with_the_steps_it_makes() -> None:
    times = {algorithms.PLAIN: [1.0], algorithms.WEIGHTED: [2.0], "s: a": [7.0], "s: b, 10 steps": [7.0]}
    apart = Case("a", "s", "", list)
    keeps = Case("b", "s", "", list, steps=10, keeps_steps=True)
    assert algorithms.period(None, 10, times) == [10.0]
    assert algorithms.period(apart, 10, times) == [27.0]
    assert algorithms.period(keeps, 10, times) == [7.0]
    live = {algorithms.PLAIN: 4, algorithms.WEIGHTED: 6, "s: a": 5, "s: b, 10 steps": 5}
    plain, a, b = algorithms.rows_of([apart, keeps], [10], 3, times, live)
    assert plain["samples_per_s"][0] == 3.0 and a["throughput_of_plain"][0] == pytest.approx(10 / 27)
    assert (a["live_bytes"], b["live_bytes"]) == (6, 5)
    assert [row["name"] for row in algorithms.rows_of([apart, keeps], [1], 3, times, live)] == [algorithms.PLAIN, "a"]


def test_comparison_sees_another_function() -> None:
    """Cosines of meta gradients are close to 1 for different algorithms; the distance is what tells them apart."""
    task = Task("toy", 4, 8, CPU, ATTENTION)
    task.without_randomness()
    first, again, other = (gradient(task, a) for a in (T1T2(), T1T2(), ConjugateGradient(iterations=3)))
    assert compare(first, again)[1] < 1e-4 < algorithms.SAME < compare(other, first)[1]
    assert compare(first, [-x for x in first]) == pytest.approx((-1.0, 2.0))


def test_table_says_what_agrees() -> None:
    row = {"key": "k", "cosine": 0.5, "distance": 0.9, "same": False, "differs": ""}
    assert "NOT the same" in algorithm_table.agreement(row)
    assert "another function: why" in algorithm_table.agreement({**row, "differs": "why"})
    assert algorithm_table.agreement({**row, "same": True}).endswith("the same")


def test_every_case_has_a_key_of_its_own() -> None:
    task = Task("toy", 2, 4, CPU, ATTENTION)
    keys = [case.key for case in ours(task, 2, algorithms.UNROLLS)]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("package", ["betty-ml", "higher", "torchopt"])
def test_missing_peers_are_named(package: str, quick: Path) -> None:
    assert len(MODULES) == 3
    about, *rows = records(quick, "algorithms_toy_2x4_cpu.jsonl")
    if installed(package) is None:
        assert any(line.startswith(package) for line in about["missing_peers"])
    else:
        compared = [row for row in rows if row["record"] == "agreement" and row["source"].startswith(package)]
        assert compared and all(row["same"] or row["differs"] for row in compared)
