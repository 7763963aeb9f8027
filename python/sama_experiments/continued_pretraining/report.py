"""The tables of a finished experiment, and the JSON that holds everything needed to repeat it."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..common.records import machine, versions
from ..data import TextDataset
from .evaluation import WEIGHED_TEXTS, Run
from .methods import METHODS
from .options import Options
from .paper_results import paper_scores


@dataclass(frozen=True)
class Results:
    """A finished experiment."""

    dataset: TextDataset
    metric: str
    options: Options
    runs: list[Run]


@dataclass(frozen=True)
class Row:
    """One method over all seeds; std is the sample standard deviation (0 for a single seed).

    ``weights`` are the mean learned weights by domain, ``weight_auc`` tells in-domain text from the rest by them.
    """

    method: str
    title: str
    score_mean: float
    score_std: float
    train_score: float
    seconds: float
    weights: dict[str, float]
    weight_auc: list[float]
    paper: float | None


def table_rows(results: Results) -> list[Row]:
    """One row a method, in the order in which they ran."""
    rows = []
    domains = list(results.dataset.auxiliary)
    paper = paper_scores(results.dataset.name)[1]
    for key in dict.fromkeys(run.method for run in results.runs):
        group = [run for run in results.runs if run.method == key]
        learned = [run.weights for run in group if run.weights]
        means = [statistics.mean(weights) for weights in zip(*learned, strict=True)]
        rows.append(
            Row(
                method=key,
                title=METHODS[key].title,
                score_mean=statistics.mean(run.score for run in group),
                score_std=statistics.stdev(run.score for run in group) if len(group) > 1 else 0.0,
                train_score=statistics.mean(run.train_score for run in group),
                seconds=statistics.mean(run.seconds for run in group),
                weights=dict(zip(domains, means, strict=False)),
                weight_auc=[run.weight_auc for run in group if run.weight_auc is not None],
                paper=paper.get("sama" if METHODS[key].adaptation == "paper" else key),
            )
        )
    return rows


def print_tables(console: Console, results: Results) -> None:
    """Scores beside the paper's, learned weights by domain, and what the columns mean."""
    dataset, options, runs = results.dataset, results.options, results.runs
    rows = table_rows(results)
    column, _ = paper_scores(dataset.name)
    where = "dev" if options.preparation.score_on == "validation" else "test"
    title = f"{dataset.name}: {results.metric} on {where}, {len(options.seeds)} seed(s)"
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for name in (f"{results.metric} (%)", "on train (%)", "training (s)", f"paper, {column} (%)"):
        table.add_column(name, justify="right")
    for row in rows:
        score = f"{100 * row.score_mean:.2f} ± {100 * row.score_std:.2f}"
        paper = "" if row.paper is None else f"{row.paper:.2f}"
        table.add_row(row.title, score, f"{100 * row.train_score:.1f}", f"{row.seconds:.0f}", paper)
    console.print(table)
    learned = [row for row in rows if row.weights]
    if learned:
        console.print(_weights_table(learned, list(dataset.auxiliary)))
    for line in _paired_differences(runs):
        console.print(line, soft_wrap=True, highlight=False)
    console.print("\n".join(_notes(results)), soft_wrap=True, highlight=False)


def _weights_table(rows: list[Row], domains: list[str]) -> Table:
    table = Table(title=f"mean learned weight of {WEIGHED_TEXTS} texts a domain (1 at the start)", title_justify="left")
    table.add_column("method")
    for domain in [*domains, f"AUC of {domains[0]}, each seed"]:
        table.add_column(domain, justify="right")
    for row in rows:
        areas = ", ".join(f"{area:.2f}" for area in row.weight_auc)
        table.add_row(row.title, *(f"{row.weights[domain]:.3f}" for domain in domains), areas)
    return table


def _notes(results: Results) -> list[str]:
    runs, settings = results.runs, results.options.settings
    norm = statistics.mean(run.base_norm for run in runs)
    notes = [
        "Every method makes the same number of downstream steps; DAPT makes as many on auxiliary text before them.",
        "± is the standard deviation over seeds, which vary the labelled texts, initialisation and batches.",
        f"alpha = {settings.alpha:g} is {100 * settings.alpha / norm:.2f} % of the norm of the base parameters "
        f"({norm:.1f}).",
    ]
    if len(results.dataset.auxiliary) > 1:
        own = next(iter(results.dataset.auxiliary))
        areas = [run.loss_auc for run in runs if run.loss_auc is not None]
        notes.append(
            f"For scale: the bare masked-language-model loss tells {own} with AUC {statistics.mean(areas):.2f}."
        )
    skipped = sum(run.degenerate_meta_steps for run in runs)
    if skipped:
        notes.append(f"{skipped} meta steps had no usable direction and changed nothing.")
    return notes


def _paired_differences(runs: list[Run]) -> list[str]:
    """Score of each SAMA method minus each baseline's; a seed's labelled texts are the same for all."""
    score = {(run.method, run.seed): 100 * run.score for run in runs}
    seeds = list(dict.fromkeys(run.seed for run in runs))
    keys = list(dict.fromkeys(run.method for run in runs))
    lines = []
    for learned in (key for key in keys if METHODS[key].adaptation == "paper"):
        for baseline in (key for key in keys if not METHODS[key].meta):
            listed = ", ".join(f"{score[learned, seed] - score[baseline, seed]:+.2f}" for seed in seeds)
            lines.append(f"'{METHODS[learned].title}' minus '{METHODS[baseline].title}', seed by seed: {listed}")
    return lines


def write_json(path: Path, results: Results, seconds: float) -> None:
    """Every setting, the table, and the results of every run."""
    dataset = results.dataset
    content = {
        "options": asdict(results.options),
        "data": {
            "name": dataset.name,
            "metric": results.metric,
            "classes": dataset.classes,
            **{split: len(getattr(dataset, split)) for split in ("train", "dev", "test")},
            "auxiliary": {domain: len(texts) for domain, texts in dataset.auxiliary.items()},
        },
        "table": [asdict(row) for row in table_rows(results)],
        "runs": [_run_summary(run) for run in results.runs],
        "seconds": seconds,
        "machine": machine(),
        "versions": versions(),
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _run_summary(run: Run) -> dict[str, Any]:
    return {name: value for name, value in vars(run).items() if name != "sample"}
