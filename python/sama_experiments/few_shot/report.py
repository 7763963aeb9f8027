"""The tables of a finished experiment, the paper's claim against them, and the JSON that holds all of it."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..common.records import machine, versions
from .evaluation import Run
from .methods import METHODS
from .options import Options
from .tasks import Characters

PAPER = """\
The paper's statement (Appendix D, Figure 4, Omniglot 20-way): "the increased model size leads to consistent
improvements in few-shot classification accuracy". Its accuracies are in the figure only. For scale: iMAML's own paper
reports 94.5 % (1-shot), 98.7 % (5-shot) on Omniglot with 64 filters and gradient descent, after far longer training."""


@dataclass(frozen=True)
class Results:
    """A finished experiment; ``pixels``: shots -> accuracy of the nearest mean of pixels for each seed."""

    characters: Characters
    options: Options
    runs: list[Run]
    pixels: dict[int, list[float]]
    processes: int


@dataclass(frozen=True)
class Row:
    """One method, width and number of shots over all seeds.

    accuracy_std is that of the seeds (0 for one seed); task_error is the half width of the 95 % interval of the mean
    over all tasks of all seeds, as usual in work on few-shot learning: it knows nothing of the spread of training.
    """

    shots: int
    method: str
    title: str
    width: int
    parameters: int
    accuracy_mean: float
    accuracy_std: float
    task_error: float
    accuracies: list[float]
    seconds: float
    degenerate: int


def table_rows(results: Results) -> list[Row]:
    """In the order of the runs; accuracies are in the order of the seeds."""
    groups: dict[tuple[int, str, int], list[Run]] = {}
    for run in results.runs:
        groups.setdefault((run.shots, run.method, run.width), []).append(run)
    rows = []
    for (shots, method, width), group in groups.items():
        accuracies = [run.accuracy for run in group]
        tasks = len(group) * results.options.settings.test_tasks
        rows.append(
            Row(
                shots=shots,
                method=method,
                title=METHODS[method].title,
                width=width,
                parameters=group[0].parameters,
                accuracy_mean=statistics.mean(accuracies),
                accuracy_std=spread(accuracies),
                task_error=1.96 * (statistics.mean(run.task_std**2 for run in group) / tasks) ** 0.5,
                accuracies=accuracies,
                seconds=statistics.mean(run.seconds for run in group),
                degenerate=sum(run.degenerate for run in group),
            )
        )
    return rows


def spread(values: list[float]) -> float:
    """Sample standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def verdict(rows: list[Row], method: str, shots: int) -> str:
    """The paper's claim for one method: does the accuracy grow at every step to the next width?

    Where the mean rises by no more than the 95 % intervals of both widths' tasks together, nothing is confirmed.
    """
    found = sorted((row for row in rows if (row.method, row.shots) == (method, shots)), key=lambda row: row.width)
    if len(found) < 2:
        return f"{METHODS[method].title}, {shots}-shot: one width says nothing about growth"
    steps = list(pairwise(found))
    gains = ", ".join(
        f"{a.width} to {b.width}: {100 * (b.accuracy_mean - a.accuracy_mean):+.1f}"
        f" ({', '.join(f'{100 * (y - x):+.1f}' for x, y in zip(a.accuracies, b.accuracies, strict=True))})"
        for a, b in steps
    )
    rises = sum(b.accuracy_mean - a.accuracy_mean > math.hypot(a.task_error, b.task_error) for a, b in steps)
    everywhere = all(y > x for a, b in steps for x, y in zip(a.accuracies, b.accuracies, strict=True))
    total = found[-1].accuracy_mean - found[0].accuracy_mean
    if rises == len(steps):
        word = "confirmed" + (", for every seed" if everywhere else ", in the mean over seeds")
    else:
        word = f"NOT confirmed: {rises} of {len(steps)} steps rise by more than the noise of the tasks"
    return (
        f"{METHODS[method].title}, {shots}-shot: accuracy grows at every step to the next width {word}. In points, "
        f"mean (seed by seed): {gains}; in all {100 * total:+.1f}."
    )


def print_tables(console: Console, results: Results) -> None:
    """A table for each number of shots, and under them what they mean."""
    options, rows = results.options, table_rows(results)
    for shots in options.shots:
        title = (
            f"{results.characters.name}: {options.settings.ways}-way {shots}-shot accuracy (%) on {options.score_on} "
            f"classes, {len(options.seeds)} seed(s)"
        )
        table = Table(title=title, title_justify="left")
        table.add_column("method")
        for width in options.widths:
            table.add_column(f"width {width}", justify="right")
        for method in options.methods:
            cells = {row.width: row for row in rows if (row.method, row.shots) == (method, shots)}
            table.add_row(METHODS[method].title, *(_cell(cells[width]) for width in options.widths))
        pixels = results.pixels[shots]
        table.add_row("nearest mean of pixels", f"{100 * statistics.mean(pixels):.1f} ± {100 * spread(pixels):.1f}")
        console.print(table)
    error = max(row.task_error for row in rows)
    lines = [
        results.characters.origin + ".",
        f"± is the standard deviation over seeds; 95 % intervals over the test tasks are at most ± {100 * error:.1f}.",
        *(verdict(rows, m, k) for m in options.methods if METHODS[m].learns for k in options.shots),
        PAPER,
    ]
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def _cell(row: Row) -> str:
    return f"{100 * row.accuracy_mean:.1f} ± {100 * row.accuracy_std:.1f}"


def write_json(path: Path, results: Results, seconds: float, cpu_seconds: float) -> None:
    """Every setting, the table, the claim, and the results of every run: an entry a line.

    ``cpu_seconds`` is this process's, all its threads together: what other programs on the machine do not change much.
    """
    rows = table_rows(results)
    options = results.options
    content: dict[str, Any] = {
        "options": options.kept(),
        "processes": results.processes,
        "data": {
            "name": results.characters.name,
            "origin": results.characters.origin,
            **{split: list(images.shape[:2]) for split, images in results.characters.splits.items()},
        },
        "nearest_mean_of_pixels": {str(shots): found for shots, found in results.pixels.items()},
        "verdict": [verdict(rows, m, k) for m in options.methods if METHODS[m].learns for k in options.shots],
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "machine": machine(),
        "versions": versions(),
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    for name, entries in (("table", rows), ("runs", results.runs)):
        listed = ",\n".join(json.dumps(asdict(entry)) for entry in entries)
        lines.append(f"{json.dumps(name)}: [\n{listed}\n]")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
