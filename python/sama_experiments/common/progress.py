"""Progress bars: one for all runs of a program and one for the work at hand."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from rich import progress
from rich.console import Console


class Progress(Protocol):
    """What long work tells about its progress."""

    def stage(self, title: str, total: int) -> None:
        """A new piece of work of ``total`` units begins."""

    def advance(self, units: int = 1) -> None:
        """So many units of it are done."""


class ProgressBars:
    """On a terminal one bar for the whole program and one for the work at hand; a context manager.

    Elsewhere only what is printed.
    """

    def __init__(self, console: Console, runs: int) -> None:
        columns = (
            progress.TextColumn("{task.description:<55}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
        )
        self._bars = progress.Progress(*columns, console=console, disable=console.quiet or not console.is_terminal)
        self._all = self._bars.add_task("all runs", total=runs)
        self._now: progress.TaskID | None = None

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def stage(self, title: str, total: int) -> None:
        """A new piece of work begins."""
        if self._now is not None:
            self._bars.remove_task(self._now)
        self._now = self._bars.add_task(title, total=total)

    def advance(self, units: int = 1) -> None:
        """So many units of the work at hand are done."""
        if self._now is not None:
            self._bars.advance(self._now, units)

    def run_done(self) -> None:
        """One run of the program is done."""
        self._bars.advance(self._all)

    def print(self, line: str) -> None:
        """A line above the bars."""
        self._bars.console.print(line, soft_wrap=True, highlight=False)
