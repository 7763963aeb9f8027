"""Noisy finetuning with learned data weights and labels, section 4.1 of the paper.

``python -m sama_experiments.noisy_finetuning`` finetunes a transformer on weak labels (majority votes of labelling
functions) in several ways and prints one table: plain finetuning, finetuning on a few clean labels alone, and SAMA's
data reweighting and label correction guided by those clean labels.
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from ..common import launch, processes
from ..common.checkpoints import Checkpoint
from ..common.encoder import PretrainedEncoder, default_model_folder
from ..common.errors import ExperimentError
from ..common.processes import choose_device
from ..common.progress import ProgressBars
from ..data import WeakDataset, load_reviews, load_wrench
from . import figure, report
from .experiment import Experiment
from .methods import METHODS
from .options import Options, parse


def load_data(options: Options) -> WeakDataset:
    """The shipped movie reviews, or the WRENCH folder that ``--data`` names."""
    if options.data is None:
        if options.vote == "weighted":
            raise ExperimentError("--vote weighted is for --data: the movie reviews come with a majority of 3 lexicons")
        return load_reviews(options.limit)
    if options.limit is not None:
        raise ExperimentError("--limit is for the movie reviews, not for --data")
    return load_wrench(options.data, weighted=options.vote == "weighted")


def run_experiment(options: Options, console: Console) -> None:
    """Train every method on every seed; print the table, write the JSON and the PNG."""
    started = time.perf_counter()
    out = launch.out_folder(options.out)
    device = choose_device(options.device)
    folder = default_model_folder() if options.model is None else Path(options.model)
    checkpoint = Checkpoint(out, options.kept(), options.restart)
    methods = [METHODS[key] for key in options.methods]
    differentiable = any(method.meta and not method.sama for method in methods)
    encoder = PretrainedEncoder(folder, options.train_layers, options.max_tokens, device, differentiable)
    dataset = load_data(options)
    if checkpoint.resumed:
        console.print(f"going on from {checkpoint.path}", soft_wrap=True, highlight=False)
    with ProgressBars(console, len(methods) * len(options.seeds)) as progress:
        experiment = Experiment(dataset, encoder, options.settings, options.score_on, progress)
        runs = []
        for seed in options.seeds:
            for method in methods:
                run = experiment.run(method, seed, progress, checkpoint)
                runs.append(run)
                progress.run_done()
                progress.print(f"{method.title}, seed {seed}: {100 * run.accuracy:.2f} % in {run.seconds:.0f} s")
        memory = {method.key: experiment.memory(method, options.seeds[0]) for method in methods}
        probe = [experiment.linear_probe(seed) for seed in options.seeds]
    if processes.rank() > 0:
        return
    results = report.Results(dataset, options, runs, memory, probe, processes.world())
    report.print_table(console, results)
    checkpoint.remove()
    seconds = time.perf_counter() - started
    table_file, picture = out / "noisy_finetuning.json", out / "noisy_finetuning.png"
    report.write_json(table_file, results, seconds)
    figure.draw(picture, runs, f"{dataset.name}: learning data weights with SAMA")
    console.print(f"{seconds:.0f} s on {device}; wrote {table_file} and {picture}", soft_wrap=True, highlight=False)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return launch.run(lambda: parse(arguments), run_experiment)
