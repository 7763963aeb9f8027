"""The picture of an experiment: weights by domain, weight against loss, and how the score moved."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .evaluation import CURVE_TEXTS, Run
from .methods import METHODS

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def draw(path: Path, runs: list[Run], domains: list[str], metric: str, title: str) -> None:
    """Write a PNG of three panels."""
    figure, (bars, scatter, curves) = plt.subplots(1, 3, figsize=(18.5, 4.6), layout="constrained")
    learned = [run for run in runs if run.weights]
    if learned:
        _weights_by_domain(bars, learned, domains)
        _weight_against_loss(scatter, next(run for run in learned if run.method == learned[-1].method), domains)
    else:
        for axes in (bars, scatter):
            axes.set_axis_off()
            axes.text(0.5, 0.5, "no method with learned weights was run", ha="center")
    _score_over_steps(curves, runs, metric)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _weights_by_domain(axes: Axes, runs: list[Run], domains: list[str]) -> None:
    keys = list(dict.fromkeys(run.method for run in runs))
    for number, domain in enumerate(domains):
        for place, key in enumerate(keys):
            found = [run.weights[number] for run in runs if run.method == key]
            x = place + 0.8 * (number + 0.5) / len(domains) - 0.4
            label = domain if place == 0 else None
            colour = COLOURS[number % len(COLOURS)]
            axes.bar(x, statistics.mean(found), 0.7 / len(domains), color=colour, alpha=0.5, label=label)
            axes.scatter([x] * len(found), found, s=12, color=colour)
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(keys)), [METHODS[key].title for key in keys], fontsize=8)
    axes.set(ylabel="mean learned weight", title="weights by domain (bar: mean over seeds, points: each seed)")
    axes.legend()


def _weight_against_loss(axes: Axes, run: Run, domains: list[str]) -> None:
    for number, domain in enumerate(domains):
        losses = [loss for where, loss, _ in run.sample if where == number]
        weights = [weight for where, _, weight in run.sample if where == number]
        axes.scatter(losses, weights, s=9, alpha=0.5, color=COLOURS[number % len(COLOURS)], label=domain)
    title = f"weight against loss\n({METHODS[run.method].title}, seed {run.seed})"
    axes.set(xlabel="masked-language-model loss at the end", ylabel="learned weight", title=title)
    axes.legend()


def _score_over_steps(axes: Axes, runs: list[Run], metric: str) -> None:
    for key in dict.fromkeys(run.method for run in runs):
        curves = [run.curve for run in runs if run.method == key]
        steps = [step for step, _ in curves[0]]
        means = [100 * statistics.mean(curve[i][1] for curve in curves) for i in range(len(steps))]
        axes.plot(steps, means, marker="o", markersize=3, label=METHODS[key].title)
    axes.set(
        xlabel="step",
        ylabel=f"{metric} (%)",
        title=f"{metric} over steps, on {CURVE_TEXTS} texts until the last\n(mean over seeds)",
    )
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the lines, not over them
