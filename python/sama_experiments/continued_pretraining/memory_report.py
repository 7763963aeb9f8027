"""The table, the JSON and the picture of memory against model size."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from ..common.records import machine, versions
from .memory import BATCH, STEPS, TOKENS, MemoryPoint

MIB = 2**20


def print_table(console: Console, points: list[MemoryPoint]) -> None:
    """Peak MiB of every algorithm on every size, and against the first algorithm."""
    algorithms = list(dict.fromkeys(point.algorithm for point in points))
    table = Table(title=f"peak memory (MiB), batch {BATCH} of {TOKENS} tokens, {STEPS} steps", title_justify="left")
    for name in ("encoder", "parameters", *(algorithm.replace("_", " ") for algorithm in algorithms)):
        table.add_column(name, justify="right")
    for size in dict.fromkeys(point.size for point in points):
        of_size = {point.algorithm: point for point in points if point.size == size}
        first = of_size[algorithms[0]]
        cells = [f"{point.bytes / MIB:.0f} ({point.bytes / first.bytes:.2f}×)" for point in of_size.values()]
        table.add_row(size, f"{first.parameters / 1e6:.1f} M", *cells)
    console.print(table)
    console.print(f"Measured: {points[0].measure}.", soft_wrap=True, highlight=False)


def write(folder: Path, points: list[MemoryPoint]) -> tuple[Path, Path]:
    """``continued_pretraining_memory.json`` and ``.png`` in ``folder``."""
    table_file, picture = (folder / f"continued_pretraining_memory.{kind}" for kind in ("json", "png"))
    content = {
        "batch": BATCH,
        "tokens": TOKENS,
        "steps": STEPS,
        "points": [asdict(point) for point in points],
        "machine": machine(),
        "versions": versions(),
    }
    table_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for algorithm in dict.fromkeys(point.algorithm for point in points):
        of_it = sorted((p.parameters / 1e6, p.bytes / MIB) for p in points if p.algorithm == algorithm)
        axes.plot([x for x, _ in of_it], [y for _, y in of_it], marker="o", label=algorithm)
    axes.set(xlabel="parameters (millions)", ylabel="peak memory (MiB)", title="memory against model size, RoBERTa")
    axes.legend()
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    return table_file, picture
