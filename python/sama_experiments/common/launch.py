"""How every program starts: its options, its processes, and one line for an error."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from . import processes
from .errors import ExperimentError

Options = TypeVar("Options")
Work = Callable[[Options, Console], None]


def run(parse: Callable[[], Options], work: Work[Options]) -> int:
    """Do ``work`` in all processes that a launcher started, the first of which speaks; returns the exit status."""
    with processes.joined() as report_error:
        with processes.first_speaks():
            options = parse()
        try:
            work(options, Console(quiet=processes.rank() > 0))
        except ExperimentError as error:
            report_error(f"error: {error}")
            return 2
    return 0


def run_alone(parse: Callable[[], Options], work: Work[Options]) -> int:
    """The same for a program that is not divided over processes; a launcher's second process is an error."""
    options = parse()
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ExperimentError("this program runs in one process: start it without torchrun or accelerate launch")
        work(options, Console())
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def out_folder(name: str) -> Path:
    """The folder of ``--out``, made if it is not there."""
    out = Path(name)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExperimentError(f"--out {out}: {error.strerror}") from error
    return out
