"""Data pruning with learned importance weights, section 4.3 of the paper.

``python -m sama_experiments.data_pruning`` scores the training samples in several ways, prunes those with the lowest
scores, trains on what is left, and prints accuracies, the time of the searches and, where wrong labels and copies were
put into the data, whether those were found.
"""

from __future__ import annotations

import time

from rich.console import Console

from ..common import launch, processes
from ..common.checkpoints import Checkpoint
from ..common.processes import choose_device
from ..common.progress import ProgressBars
from . import datasets, figure, report
from .experiment import Experiment
from .methods import METHODS
from .options import Options, check, parse


def run_experiment(options: Options, console: Console) -> None:
    """Prune by every method on every seed; print the tables, write the JSON and the PNG."""
    started = time.perf_counter()
    check(options)
    out = launch.out_folder(options.out)
    device = choose_device(options.device)
    checkpoint = Checkpoint(out, options.kept(), options.restart)
    if checkpoint.resumed:
        console.print(f"going on from {checkpoint.path}", soft_wrap=True, highlight=False)
    methods = [METHODS[key] for key in options.methods]
    searches, runs = [], []
    with ProgressBars(console, len(methods) * len(options.ratios) * len(options.seeds)) as progress:
        for seed in options.seeds:
            data = datasets.load(options, seed, device)
            experiment = Experiment(data, options, seed, checkpoint, progress)
            found = experiment.searches(methods)
            searches += list(found.values())
            progress.print(f"seed {seed}: accuracy with all samples {100 * found['full'].accuracy:.2f} %")
            for method in methods:
                own = []
                for ratio in options.ratios:
                    own.append(experiment.run(method, ratio, found))
                    progress.run_done()
                listed = ", ".join(f"{100 * run.accuracy:.2f}" for run in own)
                progress.print(f"seed {seed}: {method.title}: {listed} %")
                runs += own
    if processes.rank() > 0:
        return
    results = report.Results(data, options, searches, runs)
    seconds = time.perf_counter() - started
    table_file, picture = out / "data_pruning.json", out / "data_pruning.png"
    report.write_json(table_file, results, seconds)
    figure.draw(picture, results)
    checkpoint.remove()
    report.print_tables(console, results)
    console.print(f"{seconds:.0f} s on {device}; wrote {table_file} and {picture}", soft_wrap=True, highlight=False)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return launch.run(lambda: parse(arguments), run_experiment)
