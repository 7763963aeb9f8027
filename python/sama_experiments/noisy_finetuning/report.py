"""The table of a finished experiment, and the JSON that holds everything needed to repeat it."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..common.records import machine, versions
from ..data import WeakDataset
from . import paper
from .evaluation import Run
from .experiment import MemoryUse
from .methods import METHODS
from .options import Options


@dataclass(frozen=True)
class Results:
    """A finished experiment; ``linear_probe`` holds one accuracy per seed."""

    dataset: WeakDataset
    options: Options
    runs: list[Run]
    memory: dict[str, MemoryUse]
    linear_probe: list[float]
    processes: int


@dataclass(frozen=True)
class Row:
    """One method over all seeds. Throughput and memory are relative to the first method of the table."""

    method: str
    title: str
    accuracy_mean: float
    accuracy_std: float
    throughput: float
    memory: float


def table_rows(results: Results) -> list[Row]:
    """Means over seeds; std is the sample standard deviation (0 for a single seed)."""
    memory = results.memory
    by_method: dict[str, list[Run]] = {}
    for run in results.runs:
        by_method.setdefault(run.method, []).append(run)
    reference = next(iter(by_method))
    speed = {key: statistics.median(run.samples_per_second for run in group) for key, group in by_method.items()}
    rows = []
    for key, group in by_method.items():
        scores = [run.accuracy for run in group]
        rows.append(
            Row(
                method=key,
                title=METHODS[key].title,
                accuracy_mean=statistics.mean(scores),
                accuracy_std=_spread(scores),
                throughput=speed[key] / speed[reference],
                memory=memory[key].bytes / memory[reference].bytes,
            )
        )
    return rows


def _spread(scores: list[float]) -> float:
    return statistics.stdev(scores) if len(scores) > 1 else 0.0


def print_table(console: Console, results: Results) -> None:
    """The table, and under it what its columns mean."""
    dataset, options, runs = results.dataset, results.options, results.runs
    rows = table_rows(results)
    title = f"{dataset.name}: accuracy on {options.score_on}, {len(options.seeds)} seed(s)"
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    beside = paper.nearest(dataset.name)
    for name in ("accuracy (%)", "throughput", "peak memory", f"paper, {beside} (%)"):
        table.add_column(name, justify="right")
    for row in rows:
        score = f"{100 * row.accuracy_mean:.2f} ± {100 * row.accuracy_std:.2f}"
        reported = paper.accuracy(beside, row.method)
        cells = [score, f"{row.throughput:.2f}×", f"{row.memory:.2f}×", "" if reported is None else f"{reported:.2f}"]
        table.add_row(row.title, *cells)
    console.print(table)
    right, coverage = dataset.weak_label_quality()
    norm = statistics.mean(run.base_norm for run in runs)
    for line in _paired_differences(runs):
        console.print(line, soft_wrap=True, highlight=False)
    alpha = options.settings.alpha
    if beside not in dataset.name.lower():
        console.print(
            f"The paper's column is its {beside}, for scale only: other texts, votes, clean labels, model and steps.",
            soft_wrap=True,
            highlight=False,
        )
    probe = f"{100 * statistics.mean(results.linear_probe):.2f} ± {100 * _spread(results.linear_probe):.2f} %"
    measure = next(iter(results.memory.values())).measure
    voters = ", ".join(dataset.voters) if len(dataset.voters) <= 5 else f"{len(dataset.voters)} labelling functions"
    if results.processes > 1:
        console.print(
            f"{results.processes} processes: throughput counts the batch samples of all of them, peak memory is "
            "that of the one that holds the most (gloo's threads keep what they sent last: up to a copy of the trained "
            "parameters more, by chance).",
            soft_wrap=True,
            highlight=False,
        )
    console.print(
        f"The weak labels (majority of {voters}) cover {100 * coverage:.1f} % of the training texts and are right for "
        f"{100 * right:.1f} % of those.\n"
        f"For scale: logistic regression on frozen sentence features, fitted to the clean labels alone: {probe}.\n"
        f"± is the standard deviation over seeds, which vary the clean labels, initialisation and batches.\n"
        f"Throughput: batch samples per second against '{rows[0].title}', once meta steps have begun (clean samples "
        f"beside weak ones are not counted).\nPeak memory: {measure}; model and optimizer state included, texts not.\n"
        f"alpha = {alpha:g} is {100 * alpha / norm:.2f} % of the norm of the trained parameters ({norm:.1f}).",
        soft_wrap=True,
        highlight=False,
    )


def _paired_differences(runs: list[Run]) -> list[str]:
    """Accuracy of label correction with SAMA minus each baseline's; a seed's clean labels are the same for all."""
    score = {(run.method, run.seed): 100 * run.accuracy for run in runs}
    seeds = sorted({run.seed for run in runs})
    lines = []
    for learned in ("sama-rc", "sama-rc-clean"):
        for baseline in ("weak", "clean", "weak-clean"):
            if {(learned, seeds[0]), (baseline, seeds[0])} <= score.keys():
                differences = [score[learned, seed] - score[baseline, seed] for seed in seeds]
                listed = ", ".join(f"{difference:+.2f}" for difference in differences)
                lines.append(f"'{METHODS[learned].title}' minus '{METHODS[baseline].title}', seed by seed: {listed}")
    return lines


def write_json(path: Path, results: Results, seconds: float) -> None:
    """Every setting, the table, and the results of every run."""
    dataset = results.dataset
    right, coverage = dataset.weak_label_quality()
    content = {
        "options": asdict(results.options),
        "processes": results.processes,
        "data": {
            "name": dataset.name,
            "classes": dataset.classes,
            "train": len(dataset.train),
            "dev": len(dataset.dev),
            "test": len(dataset.test),
            "weak_label_accuracy": right,
            "weak_label_coverage": coverage,
        },
        "table": [asdict(row) for row in table_rows(results)],
        "runs": [_run_summary(run) for run in results.runs],
        "linear_probe_accuracy": results.linear_probe,
        "peak_memory": {key: asdict(use) for key, use in results.memory.items()},
        "seconds": seconds,
        "machine": machine(),
        "versions": versions(),
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _run_summary(run: Run) -> dict[str, Any]:
    summary = {name: value for name, value in vars(run).items() if name != "weights"}
    if run.weights is not None:
        right = run.weights.weak_label_right
        summary["learned"] = {
            "mean_weight_where_weak_label_is_right": run.weights.weights[right].mean().item(),
            "mean_weight_where_weak_label_is_wrong": run.weights.weights[~right].mean().item(),
            "weak_label_accuracy": right.double().mean().item(),
            "used_label_accuracy": run.weights.used_label_right.double().mean().item(),
        }
    return summary
