"""The picture of an experiment: what the weight net learned, and how accuracy moved."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .evaluation import CURVE_TEXTS, Run, SampleWeights
from .methods import METHODS

RIGHT, WRONG = "tab:blue", "tab:red"


def draw(path: Path, runs: list[Run], title: str) -> None:
    """Write a PNG: weight against loss, weights of rightly and wrongly labelled samples, accuracy over steps."""
    figure, (scatter, histogram, curves) = plt.subplots(1, 3, figsize=(18.5, 4.6), layout="constrained")
    shown = _last_meta_run(runs)
    if shown is not None and shown.weights is not None:
        where = f"{METHODS[shown.method].title}, seed {shown.seed}"
        _weight_against_loss(scatter, shown.weights, where)
        _weights_by_truth(histogram, shown.weights, where)
    else:
        for axes in (scatter, histogram):
            axes.set_axis_off()
            axes.text(0.5, 0.5, "no method with learned weights was run", ha="center")
    _accuracy_over_steps(curves, runs)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _last_meta_run(runs: list[Run]) -> Run | None:
    """A run of the table's last method that has learned weights: its first seed."""
    meta = [run for run in runs if run.weights is not None]
    return next((run for run in meta if run.method == meta[-1].method), None)


def _weight_against_loss(axes: Axes, sample: SampleWeights, where: str) -> None:
    for right, colour, label in ((True, RIGHT, "weak label right"), (False, WRONG, "weak label wrong")):
        chosen = sample.weak_label_right == right
        axes.scatter(sample.losses[chosen], sample.weights[chosen], s=9, alpha=0.5, color=colour, label=label)
    axes.set(xlabel="loss at the end of training", ylabel="learned weight", title=f"weight against loss\n({where})")
    axes.legend()


def _weights_by_truth(axes: Axes, sample: SampleWeights, where: str) -> None:
    for right, colour, name in ((True, RIGHT, "right"), (False, WRONG, "wrong")):
        weights = sample.weights[sample.weak_label_right == right]
        if len(weights) > 0:
            label = f"{name} (mean {weights.mean():.2f})"
            axes.hist(weights.numpy(), bins=25, density=True, alpha=0.6, color=colour, label=label)
    axes.set(xlabel="learned weight", ylabel="density", title=f"weights by whether the weak label is right\n({where})")
    axes.legend()


def _accuracy_over_steps(axes: Axes, runs: list[Run]) -> None:
    for key in dict.fromkeys(run.method for run in runs):
        curves = [run.curve for run in runs if run.method == key]
        steps = [step for step, _ in curves[0]]
        means = [100 * statistics.mean(curve[i][1] for curve in curves) for i in range(len(steps))]
        axes.plot(steps, means, marker="o", markersize=3, label=METHODS[key].title)
    axes.set(
        xlabel="base step",
        ylabel="accuracy (%)",
        title=f"accuracy over steps, on {CURVE_TEXTS} texts until the last\n(mean over seeds)",
    )
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the lines, not over them
