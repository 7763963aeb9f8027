"""``sama-kernels weigh`` and ``sama-kernels prune``: learned data weights for a user's own text-classification set."""

from __future__ import annotations

from rich.console import Console

from ..common import launch
from .options import PruneOptions, WeighOptions, parse
from .pruning import prune
from .weighing import weigh


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    return launch.run_alone(lambda: parse(arguments), _work)


def _work(options: WeighOptions | PruneOptions, console: Console) -> None:
    if isinstance(options, PruneOptions):
        prune(options, console)
    else:
        weigh(options, console)
