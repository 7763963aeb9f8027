"""The picture of an experiment: accuracy against width, as in the paper's Figure 4, and how meta training went."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .evaluation import Run
from .methods import METHODS
from .report import Results, table_rows

SMOOTHED = 10  # meta steps that a point of the loss curves is the mean of


def draw(path: Path, results: Results) -> None:
    """Write a PNG: for each number of shots accuracy against width, and the query loss over meta training."""
    shots = results.options.shots
    figure, grid = plt.subplots(2, len(shots), figsize=(6 * len(shots), 8), layout="constrained", squeeze=False)
    for column, k in enumerate(shots):
        _accuracy_against_width(grid[0, column], results, k)
        _losses(grid[1, column], [run for run in results.runs if run.shots == k], results)
    figure.suptitle(
        f"{results.characters.name}: a learned initialisation for {results.options.settings.ways}-way tasks"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _accuracy_against_width(axes: Axes, results: Results, shots: int) -> None:
    rows = [row for row in table_rows(results) if row.shots == shots]
    for method in results.options.methods:
        found = sorted((row for row in rows if row.method == method), key=lambda row: row.width)
        axes.errorbar(
            [row.width for row in found],
            [100 * row.accuracy_mean for row in found],
            yerr=[100 * row.accuracy_std for row in found],
            marker="o",
            capsize=3,
            label=METHODS[method].title,
        )
    level = 100 * statistics.mean(results.pixels[shots])
    axes.axhline(level, color="black", linestyle=":", label="nearest mean of pixels")
    axes.set_xscale("log", base=2)
    widths = sorted(results.options.widths)
    axes.set_xticks(widths, labels=[str(width) for width in widths])
    axes.set(xlabel="width", ylabel="accuracy (%)", title=f"{shots}-shot, bars: standard deviation over seeds")
    axes.legend(fontsize=8)


def _losses(axes: Axes, runs: list[Run], results: Results) -> None:
    """Query loss of the last learning method of the table, a line for each width."""
    learning = [method for method in results.options.methods if METHODS[method].learns]
    if not learning:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no method with meta learning was run", ha="center")
        return
    method = learning[-1]
    for width in sorted(results.options.widths):
        curves = [run.losses for run in runs if run.method == method and run.width == width]
        mean = [statistics.mean(step) for step in zip(*curves, strict=True)]
        points = [mean[i : i + SMOOTHED] for i in range(0, len(mean), SMOOTHED)]
        axes.plot(
            [i * SMOOTHED + len(point) / 2 for i, point in enumerate(points)],
            [statistics.mean(point) for point in points],
            label=f"width {width}",
        )
    axes.set(xlabel="meta step", ylabel="query loss", title=f"{METHODS[method].title}: meta training")
    axes.legend(fontsize=8)
