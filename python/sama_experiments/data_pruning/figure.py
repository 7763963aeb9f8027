"""The picture of an experiment, after the paper's Figure 3."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .methods import METHODS
from .report import Results, Row, table_rows


def draw(path: Path, results: Results) -> None:
    """Write a PNG: relative accuracy and wrong labels found over the pruned share, search times, learned weights."""
    rows = table_rows(results)
    figure, ((accuracy, found), (time, weights)) = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    _lines(accuracy, rows, "relative", "accuracy / accuracy with all samples")
    accuracy.axhline(1, color="grey", linewidth=0.8)
    accuracy.legend(fontsize=8)
    if results.data.truth is not None:
        _lines(found, rows, "wrong_found", "share of all wrong labels that is pruned")
    else:
        _nothing(found, "nothing was injected")
    _search_times(time, rows)
    _weights(weights, results)
    figure.suptitle(f"{results.data.name}: data pruning")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _lines(axes: Axes, rows: list[Row], name: str, label: str) -> None:
    for key in dict.fromkeys(row.method for row in rows):
        points = [(row.ratio, getattr(row, name)) for row in rows if row.method == key]
        known = [(ratio, value) for ratio, value in points if value is not None]
        style = "--" if METHODS[key].source in ("draw", "truth") else "-"
        width = 2.5 if key == "sama" else 1.2
        axes.plot(*zip(*known, strict=True), style, marker="o", markersize=4, linewidth=width, label=METHODS[key].title)
    axes.set(xlabel="share pruned", ylabel=label)


def _search_times(axes: Axes, rows: list[Row]) -> None:
    keys = [key for key in dict.fromkeys(row.method for row in rows) if METHODS[key].source not in ("draw", "truth")]
    times = [statistics.mean(row.search_time for row in rows if row.method == key) for key in keys]
    axes.barh([METHODS[key].title for key in keys], times)
    axes.invert_yaxis()
    axes.set(xlabel="search time / time of a full training")


def _weights(axes: Axes, results: Results) -> None:
    found = [search for search in results.searches if search.source == "sama"]
    if not found:
        _nothing(axes, "SAMA was not run")
        return
    learned, truth = found[-1].scores["sama"], results.data.truth
    if truth is None:
        axes.hist(learned.numpy(), bins=40)
    else:
        groups = {"right label": ~truth.wrong, "wrong label": truth.wrong, "with a copy": truth.twin >= 0}
        for name, chosen in groups.items():
            if chosen.any():
                axes.hist(learned[chosen].numpy(), bins=40, density=True, histtype="step", linewidth=1.5, label=name)
        axes.legend(fontsize=8)
    axes.set(xlabel=f"weight by SAMA, seed {found[-1].seed}", ylabel="density")


def _nothing(axes: Axes, why: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center")
