"""``sama-kernels weigh`` and ``sama-kernels prune``: learned data weights for a user's own text-classification set."""

from __future__ import annotations

import os
import sys

from rich.console import Console

from ..common.errors import ExperimentError
from .options import PruneOptions, parse
from .pruning import prune
from .weighing import weigh


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    options = parse(arguments)
    console = Console()
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ExperimentError("sama-kernels runs in one process; start it without torchrun or accelerate launch")
        if isinstance(options, PruneOptions):
            prune(options, console)
        else:
            weigh(options, console)
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
