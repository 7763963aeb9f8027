"""Biased regression, Appendix E of the paper: how good is SAMA's identity in the place of the base Jacobian?

``python -m sama_experiments.biased_regression`` runs SAMA and algorithms that approximate the inverse Jacobian on a
problem whose meta gradient and solution are known in closed form, and compares directions and convergence with those.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..common import launch
from ..common.arguments import positive, positive_float
from ..common.errors import ExperimentError
from ..common.records import machine, versions
from .problem import ALGORITHMS, FEATURES, NOISE, SAMPLES, BiasedRegression, Run, run

SETTING = """\
theta is w*(lambda) in closed form at every meta update: what differs is only what an algorithm takes for the inverse
of the base Jacobian H. SAMA takes D = I, as with SGD as the base optimizer (up to its learning rate). lambda_0 = 0;
meta updates by Adam, whose steps do not depend on the scale of the gradients: one learning rate is fair to all.
CG: 5 iterations. Neumann: 5 terms, step size 1 / largest eigenvalue of H. Nystroem: rank 5, damping beta.
"""

PAPER = """\
The paper's statement: SAMA "achieves a high directional alignment with the ground truth meta-gradient" and "a stable
convergence to the optimal solution at a comparable speed". Its "beta = 0.1^5" is 0.1: the 5 is the mark of a footnote,
which says "smaller beta than in the original paper (1 vs 0.1)". Hence both values here."""


@dataclass(frozen=True)
class Row:
    """One algorithm at one beta: means over updates and seeds, medians over seeds (None: not reached in most runs)."""

    beta: float
    algorithm: str
    cosine: float
    cosine_std: float
    smallest_cosine: float
    first_distance: float
    last_distance: float
    half_way: float | None
    largest_rise: float


def rows_of(runs: list[Run]) -> list[Row]:
    """One row per beta and algorithm; the std is that of the seeds' means (0 for one seed)."""
    rows = []
    for beta, name in dict.fromkeys((r.beta, r.algorithm) for r in runs):
        group = [r for r in runs if (r.beta, r.algorithm) == (beta, name)]
        means = [statistics.mean(r.cosines) for r in group]
        half_way = statistics.median(len(r.distances) if r.half_way is None else r.half_way for r in group)
        rows.append(
            Row(
                beta,
                name,
                cosine=statistics.mean(means),
                cosine_std=statistics.stdev(means) if len(means) > 1 else 0.0,
                smallest_cosine=min(min(r.cosines) for r in group),
                first_distance=statistics.mean(r.distances[0] for r in group),
                last_distance=statistics.mean(r.distances[-1] for r in group),
                half_way=None if half_way > len(group[0].cosines) else half_way,
                largest_rise=max(r.rise for r in group),
            )
        )
    return rows


def verdict(rows: list[Row], beta: float) -> str:
    """The paper's two statements against the figures. "High" is taken as a mean cosine of 0.9, "stable" as no rise of
    the distance above 5 % of the first, "comparable" as at most 1.5 times the updates that CG takes half of the way."""
    sama, cg = (next(row for row in rows if row.beta == beta and row.algorithm == name) for name in ("SAMA", "CG"))
    high, stable = sama.cosine >= 0.9, sama.largest_rise <= 0.05
    comparable = sama.half_way is not None and (cg.half_way is None or sama.half_way <= 1.5 * cg.half_way)
    return (
        f"beta = {beta:g}: high directional alignment {_confirmed(high)}: mean cosine {sama.cosine:.3f}, smallest "
        f"{sama.smallest_cosine:.3f} (CG {cg.cosine:.3f}, {cg.smallest_cosine:.3f}). Stable convergence at a "
        f"comparable speed {_confirmed(stable and comparable)}: half of the way after {_updates(sama.half_way)} updates"
        f" (CG {_updates(cg.half_way)}), distance {sama.first_distance:.2f} -> {sama.last_distance:.3g} (CG "
        f"{cg.last_distance:.3g}), largest rise {100 * sama.largest_rise:.1f} % of the first "
        f"(CG {100 * cg.largest_rise:.1f} %)."
    )


def _confirmed(yes: bool) -> str:
    return "confirmed" if yes else "NOT confirmed"


def _updates(count: float | None) -> str:
    return "more" if count is None else f"{count:g}"


def table_of(rows: list[Row]) -> Table:
    """The rows for the terminal."""
    table = Table(title="Biased regression: meta gradients against the exact one", title_justify="left")
    table.add_column("beta")
    table.add_column("algorithm")
    for name in ("cosine", "smallest", "distance", "at the end", "half way"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row.beta:g}", row.algorithm, f"{row.cosine:.3f} ± {row.cosine_std:.3f}", f"{row.smallest_cosine:.3f}",
            f"{row.first_distance:.2f}", f"{row.last_distance:.3f}", _updates(row.half_way),
        )  # fmt: skip
    return table


def curves_of(runs: list[Run], attribute: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation (0 for one run) over runs of "cosines" or "distances", at each update."""
    points = list(zip(*(getattr(r, attribute) for r in runs), strict=True))
    return [statistics.mean(x) for x in points], [statistics.stdev(x) if len(x) > 1 else 0.0 for x in points]


def draw(path: Path, runs: list[Run]) -> None:
    """Write a PNG like the paper's Figure 5, a row for each beta; bands are one standard deviation over seeds."""
    betas = list(dict.fromkeys(r.beta for r in runs))
    figure, grid = plt.subplots(
        len(betas), 2, figsize=(11, 0.6 + 3.6 * len(betas)), layout="constrained", squeeze=False
    )
    for beta, (left, right) in zip(betas, grid, strict=True):
        for name in ALGORITHMS:
            group = [r for r in runs if (r.beta, r.algorithm) == (beta, name)]
            style: dict[str, Any] = {"color": "black", "linestyle": "--"} if ALGORITHMS[name] is None else {}
            for axes, attribute in ((left, "cosines"), (right, "distances")):
                mean, spread = curves_of(group, attribute)
                (line,) = axes.plot(mean, label=name, **style)
                low, high = ([m + s * side for m, s in zip(mean, spread, strict=True)] for side in (-1, 1))
                axes.fill_between(range(len(mean)), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        left.set(xlabel="meta update", ylabel="cos(g, g approx)", title=f"direction, beta = {beta:g}")
        right.set(xlabel="meta update", ylabel="|lambda - lambda*|", title=f"distance, beta = {beta:g}", ylim=(0, None))
        right.legend(loc="upper right", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_json(path: Path, options: argparse.Namespace, runs: list[Run], rows: list[Row], seconds: float) -> None:
    """The command, the table, what the paper claims and what was found, and the curves: one entry a line."""
    problems = {(r.beta, r.seed): BiasedRegression.random(r.seed, r.beta, options.samples) for r in runs}
    by_beta = {beta: [p.conditions() for (b, _), p in problems.items() if b == beta] for beta in options.beta}
    content: dict[str, Any] = {
        "options": vars(options),
        "problem": {"samples": options.samples, "features": FEATURES, "noise": NOISE, "dtype": "float64"},
        "setting": " ".join(SETTING.split()),
        "median_conditions": [
            {"beta": beta, **{key: statistics.median(c[key] for c in found) for key in found[0]}}
            for beta, found in by_beta.items()
        ],
        "verdict": [verdict(rows, beta) for beta in options.beta],
        "seconds": seconds,
        "machine": machine(),
        "versions": versions(),
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
    lines.append(_list("table", [asdict(row) for row in rows]))
    lines.append(_list("curves", [_curves(runs, row) for row in rows]))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _list(name: str, entries: list[dict[str, Any]]) -> str:
    return f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]"


def _curves(runs: list[Run], row: Row) -> dict[str, Any]:
    group = [r for r in runs if (r.beta, r.algorithm) == (row.beta, row.algorithm)]
    found: dict[str, Any] = {"beta": row.beta, "algorithm": row.algorithm}
    for attribute in ("cosines", "distances"):
        for kind, values in zip(("mean", "std"), curves_of(group, attribute), strict=True):
            found[f"{attribute}_{kind}"] = [round(x, 5) for x in values]
    return found


def run_experiment(options: argparse.Namespace, console: Console) -> None:
    """Run every algorithm on every problem; print the table and the verdict, write the JSON and the PNG."""
    started = time.perf_counter()
    out = launch.out_folder(options.out)
    if options.samples < FEATURES:
        raise ExperimentError(f"--samples {options.samples}: fewer than the {FEATURES} features; lambda* is not unique")
    cases = [(beta, seed, name) for beta in options.beta for seed in options.seeds for name in ALGORITHMS]
    runs = []
    with Progress(console=console, disable=not console.is_terminal) as bars:
        for beta, seed, name in bars.track(cases, description="all runs"):
            problem = BiasedRegression.random(seed, beta, options.samples)
            runs.append(run(name, problem, seed, options.updates, options.meta_lr))
    rows, seconds = rows_of(runs), time.perf_counter() - started
    numbers, picture = out / "biased_regression.json", out / "biased_regression.png"
    write_json(numbers, options, runs, rows, seconds)
    draw(picture, runs)
    console.print(table_of(rows))
    for text in (SETTING, PAPER, *(verdict(rows, beta) for beta in options.beta)):
        console.print(text, soft_wrap=True, highlight=False)
    console.print(f"{seconds:.0f} s; wrote {numbers} and {picture}", soft_wrap=True, highlight=False)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line (default: ``sys.argv``)."""
    parser = argparse.ArgumentParser(
        prog="python -m sama_experiments.biased_regression",
        description="Appendix E: meta gradients of SAMA, CG, Neumann and Nystroem against the exact one.",
        epilog=f"{SETTING}\n{PAPER}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, default=list(range(10)), metavar="SEED", help="problems (default: 0 to 9)")
    add("--updates", type=positive, default=100, metavar="N", help="meta updates (default: %(default)s)")
    add("--beta", nargs="+", type=positive_float, default=[0.1, 1.0], metavar="BETA", help="(default: 0.1 1.0)")
    add("--meta-lr", type=positive_float, default=0.1, metavar="LR", help="of Adam (default: %(default)s)")
    add("--samples", type=positive, default=SAMPLES, metavar="N", help="per level (default: %(default)s)")
    add("--out", default="biased_regression_results", metavar="FOLDER", help="(default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return launch.run_alone(lambda: parse(arguments), run_experiment)
