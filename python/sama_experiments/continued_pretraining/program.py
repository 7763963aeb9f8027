"""Continued pretraining with learned weights of the auxiliary texts, section 4.2 of the paper.

``python -m sama_experiments.continued_pretraining`` finetunes an encoder on few labels in several ways and prints one
table: plain finetuning, pretraining on auxiliary text first (DAPT), both losses at once with equal weights (TARTAN-MT),
and with weights that SAMA learns; and beside it, what the weights have made of each domain of the auxiliary text.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ..common import launch
from ..common.checkpoints import Checkpoint
from ..common.encoder import PretrainedEncoder, default_model_folder
from ..common.errors import ExperimentError
from ..common.processes import choose_device
from ..common.progress import ProgressBars
from ..data import TextDataset, load_classification, load_reviews_among_domains
from . import figure, memory, memory_report, report
from .experiment import Experiment
from .methods import METHODS
from .metrics import metric_for
from .options import Options, parse

HOW_TO_RUN = {"device", "out", "restart", "memory", "memory_sizes", "memory_algorithms"}  # no result depends on these


def load_data(options: Options) -> TextDataset:
    """The shipped movie reviews and the domains beside them, or the folder that ``--data`` names."""
    if options.data is None:
        if options.auxiliary is not None:
            raise ExperimentError("--auxiliary is for --data; the movie reviews have theirs (--per-domain)")
        return load_reviews_among_domains(options.per_domain, options.limit)
    if options.limit is not None:
        raise ExperimentError("--limit is for the movie reviews, not for --data")
    return load_classification(options.data, options.auxiliary)


def run_experiment(options: Options, console: Console) -> None:
    """Train every method on every seed; print the tables, write the JSON and the PNG."""
    started = time.perf_counter()
    out = launch.out_folder(options.out)
    device = choose_device(options.device)
    folder = default_model_folder() if options.model is None else Path(options.model)
    encoder = PretrainedEncoder(folder, options.train_layers, options.max_tokens, device)
    dataset = load_data(options)
    metric = options.metric or metric_for(dataset.name)
    settings: dict[str, Any] = {name: value for name, value in asdict(options).items() if name not in HOW_TO_RUN}
    kept = Checkpoint(out, {**settings, "device": device.type}, options.restart)
    if kept.resumed:
        console.print(f"going on from {kept.path}", soft_wrap=True, highlight=False)
    methods = [METHODS[key] for key in options.methods]
    with ProgressBars(console, len(methods) * len(options.seeds)) as progress:
        experiment = Experiment(
            dataset, encoder, folder, options.settings, options.preparation, methods, metric, kept, progress
        )
        runs = []
        for seed in options.seeds:
            for method in methods:
                run = experiment.run(method, seed, progress)
                runs.append(run)
                progress.run_done()
                progress.print(f"{method.title}, seed {seed}: {100 * run.score:.2f} % in {run.seconds:.0f} s")
    results = report.Results(dataset, metric, options, runs)
    report.print_tables(console, results)
    seconds = time.perf_counter() - started
    table_file, picture = out / "continued_pretraining.json", out / "continued_pretraining.png"
    report.write_json(table_file, results, seconds)
    title = f"{dataset.name}: learning the weights of auxiliary text with SAMA"
    figure.draw(picture, runs, list(dataset.auxiliary), metric, title)
    kept.remove()
    console.print(f"{seconds:.0f} s on {device}; wrote {table_file} and {picture}", soft_wrap=True, highlight=False)


def measure_memory(options: Options, console: Console) -> None:
    """Peak memory against model size: table, JSON and PNG."""
    out = launch.out_folder(options.out)
    device = choose_device(options.device)
    sizes = options.memory_sizes or memory.default_sizes(device)
    with ProgressBars(console, len(sizes) * len(options.memory_algorithms)) as progress:

        def done(point: memory.MemoryPoint) -> None:
            progress.run_done()
            progress.print(f"{point.algorithm}, {point.size}: {point.bytes / 2**20:.0f} MiB")

        points = memory.measure(options.memory_algorithms, sizes, device, done)
    memory_report.print_table(console, points)
    written = memory_report.write(out, points)
    console.print(f"on {device}; wrote {written[0]} and {written[1]}", soft_wrap=True, highlight=False)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return launch.run_alone(lambda: parse(arguments), _work)


def _work(options: Options, console: Console) -> None:
    (measure_memory if options.memory else run_experiment)(options, console)
