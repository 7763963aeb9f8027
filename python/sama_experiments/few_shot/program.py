"""Few-shot classification with a learned initialisation, Appendix D of the paper.

``python -m sama_experiments.few_shot`` learns initialisations of a 4-layer convolutional network for 20-way tasks, with
SAMA on iMAML's proximal base problem, for several widths, and shows accuracy on unseen classes against width.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from ..common import launch, processes
from ..common.checkpoints import Checkpoint
from ..common.errors import ExperimentError
from ..common.processes import choose_device
from ..common.progress import ProgressBars
from . import figure, report
from .evaluation import Run, nearest_mean_accuracy, run
from .glyphs import load_glyphs, shipped_fonts
from .methods import METHODS
from .omniglot import load_omniglot
from .options import Options, parse
from .tasks import Characters
from .training import Problem


def load_data(options: Options, progress: ProgressBars) -> Characters:
    """The letters of matplotlib's fonts, or the Omniglot folder that ``--data`` names."""
    if options.data is None:
        if options.rotations:
            raise ExperimentError("--rotations is for --data: a turned b is a q, which may be in another split")
        progress.stage("drawing letters", len(shipped_fonts()))
        characters = load_glyphs(progress.advance)
    else:
        progress.stage("reading characters", 1623)
        characters = load_omniglot(Path(options.data), options.split, options.rotations is not False, progress.advance)
    s = options.settings
    queries = max(s.test_queries, *(s.queries or shots for shots in options.shots))
    characters.check(s.ways, max(options.shots) + queries)
    return characters


def run_experiment(options: Options, console: Console) -> None:
    """Train every method, width and number of shots on every seed; print the tables, write the JSON and the PNG."""
    started = time.perf_counter()
    if options.settings.meta_batch < processes.world():
        raise ExperimentError(f"{processes.world()} processes: --meta-batch must be at least that")
    out = launch.out_folder(options.out)
    device = choose_device(options.device)
    checkpoint = Checkpoint(out, options.kept(), options.restart)
    cases = [
        (seed, shots, width, method)
        for seed in options.seeds
        for shots in options.shots
        for width in options.widths
        for method in options.methods
    ]
    runs: list[Run] = []
    with ProgressBars(console, len(cases)) as progress:
        characters = load_data(options, progress)
        test_images = characters.splits[options.score_on]
        if checkpoint.resumed:
            progress.print(f"going on from {checkpoint.path}")
        for seed, shots, width, key in cases:
            method, name = METHODS[key], f"{key}, width {width}, {shots}-shot, seed {seed}"
            result = checkpoint.result(name)
            if result is None:
                progress.stage(name, options.settings.meta_steps if method.learns else 0)
                problem = Problem(characters.splits["train"], width, shots)
                done = run(
                    problem, method, options.settings, seed, test_images, device, checkpoint, name, progress.advance
                )
                checkpoint.finish(name, asdict(done))
                progress.print(f"{name}: {100 * done.accuracy:.1f} % after {done.seconds:.0f} s")
            else:
                done = Run(**result)
            runs.append(done)
            progress.run_done()
        pixels = {
            shots: [nearest_mean_accuracy(test_images, options.settings, shots, seed) for seed in options.seeds]
            for shots in options.shots
        }
    if processes.rank() > 0:
        return
    results = report.Results(characters, options, runs, pixels, processes.world())
    report.print_tables(console, results)
    seconds = time.perf_counter() - started
    numbers, picture = out / "few_shot.json", out / "few_shot.png"
    report.write_json(numbers, results, seconds, time.process_time())
    figure.draw(picture, results)
    checkpoint.remove()
    threads = f"{torch.get_num_threads()} thread(s)" if device.type == "cpu" else str(device)
    console.print(
        f"{seconds:.0f} s ({time.process_time():.0f} s of CPU), {threads}; wrote {numbers} and {picture}",
        soft_wrap=True,
        highlight=False,
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    return launch.run(lambda: parse(arguments), run_experiment)
