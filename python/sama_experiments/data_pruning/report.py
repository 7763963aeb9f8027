"""The tables of a finished experiment, and the JSON that holds everything needed to repeat it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..common import processes
from ..common.records import machine, versions
from .experiment import Run, Search
from .images import Dataset
from .methods import METHODS
from .options import Options

PAPER = """\
The paper (Figure 3, whose values are drawn, not printed) says of ImageNet-1k and CIFAR-10: SAMA "outperforms
heuristics-based data pruning"; on ImageNet-1k accuracy rises at ratios 0.1 and 0.2; the search takes SAMA a "comparable
or even shorter" time than heuristics."""


@dataclass(frozen=True)
class Results:
    """A finished experiment; ``data`` is that of the last seed."""

    data: Dataset
    options: Options
    searches: list[Search]
    runs: list[Run]

    def full(self) -> dict[int, Search]:
        """The training on all samples, by seed."""
        return {search.seed: search for search in self.searches if search.source == "full"}

    def of(self, method: str, ratio: float) -> list[Run]:
        """The runs of one cell of the tables, by seed."""
        return [run for run in self.runs if run.method == method and run.ratio == ratio]


@dataclass(frozen=True)
class Row:
    """One method at one ratio over all seeds; ``relative`` accuracy and ``search_time``: by those of a full training.

    Shares are means over seeds, None where nothing was injected.
    """

    method: str
    title: str
    ratio: float
    accuracy_mean: float
    accuracy_std: float
    relative: float
    minus_full: list[float]
    search_time: float
    samples_seen: float
    wrong_among_pruned: float | None
    wrong_found: float | None
    pairs_reduced: float | None
    pairs_lost: float | None


def table_rows(results: Results) -> list[Row]:
    """Means over seeds; std is the sample standard deviation (0 for a single seed)."""
    full, rows = results.full(), []
    for key in results.options.methods:
        for ratio in results.options.ratios:
            group = results.of(key, ratio)
            accuracy = [run.accuracy for run in group]
            rows.append(
                Row(
                    method=key,
                    title=METHODS[key].title,
                    ratio=ratio,
                    accuracy_mean=statistics.mean(accuracy),
                    accuracy_std=spread(accuracy),
                    relative=statistics.mean(run.accuracy / full[run.seed].accuracy for run in group),
                    minus_full=[run.accuracy - full[run.seed].accuracy for run in group],
                    search_time=statistics.mean(run.search_seconds / full[run.seed].seconds for run in group),
                    samples_seen=statistics.mean(run.samples_seen for run in group),
                    **{name: _mean([getattr(run, name) for run in group]) for name in SHARES},
                )
            )
    return rows


SHARES = ("wrong_among_pruned", "wrong_found", "pairs_reduced", "pairs_lost")


def spread(values: list[float]) -> float:
    """Sample standard deviation, 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def print_tables(console: Console, results: Results) -> None:
    """The tables, under them what their columns mean, and the paper's statements against the figures."""
    options, rows = results.options, table_rows(results)
    full = [search.accuracy for search in results.full().values()]
    title = f"{results.data.name}: accuracy on {options.score_on} (%), {len(options.seeds)} seed(s); with all samples "
    title += f"{100 * statistics.mean(full):.2f} ± {100 * spread(full):.2f}"
    table = _table(title, rows, lambda row: f"{100 * row.accuracy_mean:.2f} ± {100 * row.accuracy_std:.2f}", True)
    console.print(table)
    truth = results.data.truth
    if truth is not None and truth.wrong.any():
        share = 100 * truth.wrong.double().mean().item()
        title = f"wrong labels among the pruned / share of all wrong labels (%); {share:.1f} % of the labels are wrong"
        console.print(_table(title, rows, lambda row: _percent(row.wrong_among_pruned, row.wrong_found)))
    if truth is not None and truth.copy.any():
        title = f"of the {int(truth.copy.sum())} pairs of a sample and its copy, share that lost one or both / both (%)"
        console.print(_table(title, rows, lambda row: _percent(row.pairs_reduced, row.pairs_lost)))
    lines = [
        "± is the standard deviation over seeds, which vary what is injected, initialisation and batches. Search: time "
        "to find what to prune, by that of a full training. DynaMS selects anew while it trains; the tables below the "
        "first are of its last selection.",
    ]
    if "oracle" in options.methods:
        lines.append("The oracle knows what was put in: it prunes wrong labels, then copies, then at random.")
    for search in results.searches[:4]:
        if search.source == "sama":
            alpha, norm = options.settings.alpha, search.norm
            lines.append(f"alpha = {alpha:g} is {100 * alpha / norm:.2f} % of the norm of the parameters ({norm:.1f}).")
    for line in [*lines, PAPER, *verdicts(results)]:
        console.print(line, soft_wrap=True, highlight=False)


def _table(title: str, rows: list[Row], cell: Callable[[Row], str], search: bool = False) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    ratios = list(dict.fromkeys(row.ratio for row in rows))
    for ratio in ratios:
        table.add_column(f"{100 * ratio:g} % pruned", justify="right")
    if search:
        table.add_column("search", justify="right")
    for key in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == key]
        time = [f"{statistics.mean(row.search_time for row in own):.2f}×"] if search else []
        table.add_row(own[0].title, *(cell(row) for row in own), *time)
    return table


def _percent(*shares: float | None) -> str:
    return " / ".join("-" if share is None else f"{100 * share:.0f}" for share in shares)


def verdicts(results: Results) -> list[str]:
    """The paper's three statements against the figures, as far as the methods that were run allow."""
    rows = {(row.method, row.ratio): row for row in table_rows(results)}
    methods, ratios = results.options.methods, results.options.ratios
    heuristics = [key for key in methods if METHODS[key].source not in ("sama", "truth")]
    if "sama" not in methods or not heuristics:
        return []
    lines = []
    for ratio in ratios:
        own, best = (
            rows["sama", ratio],
            max((rows[key, ratio] for key in heuristics), key=lambda row: row.accuracy_mean),
        )
        lead = 100 * (own.accuracy_mean - best.accuracy_mean)
        gains = ", ".join(f"{100 * gain:+.2f}" for gain in own.minus_full)
        lines.append(
            f"{100 * ratio:g} % pruned: SAMA {lead:+.2f} points against the best other, {best.title}; seed by seed "
            f"{gains} against training on all samples."
        )
    time = rows["sama", ratios[0]].search_time
    searching = [(rows[key, ratios[0]].search_time, METHODS[key].title) for key in heuristics if key != "random"]
    listed = ", ".join(f"{name} {seconds:.2f}×" for seconds, name in sorted(searching))
    return [*lines, f"Search: SAMA {time:.2f}× a full training{'; ' + listed if listed else ''}."]


def write_json(path: Path, results: Results, seconds: float) -> None:
    """Every setting, the table, and the results of every run."""
    truth = results.data.truth
    content: dict[str, Any] = {
        "options": results.options.kept(),
        "processes": processes.world(),
        "data": {
            "name": results.data.name,
            "train": len(results.data.train.labels),
            "scored": len(results.data.scored.labels),
            "classes": results.data.classes,
            "wrong_labels": None if truth is None else int(truth.wrong.sum()),
            "copies": None if truth is None else int(truth.copy.sum()),
        },
        "table": [asdict(row) for row in table_rows(results)],
        "verdicts": verdicts(results),
        "searches": [
            {name: value for name, value in vars(search).items() if name != "scores"} for search in results.searches
        ],
        "runs": [asdict(run) for run in results.runs],
        "seconds": seconds,
        "machine": machine(),
        "versions": versions(),
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
