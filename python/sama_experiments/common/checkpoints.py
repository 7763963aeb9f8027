"""Resume after being killed: the results of finished runs, and the state of the one under way, in one file."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import processes
from .errors import ExperimentError

EVERY = 25  # steps between two checkpoints within a run, unless a program says otherwise


class Checkpoint:
    """The file ``checkpoint.pt`` in the folder of the results.

    A program that starts with the settings of an earlier, unfinished one goes on from there; with others it is refused,
    so that nothing is lost by a slip. What is kept must be made of dicts, lists, tuples, numbers, strings and tensors
    (the file is read without pickled code). Of several processes the first one writes; all read.

    Args:
        folder: where the results go; it must be there.
        settings: everything that the results depend on, as such data.
        restart: throw away what an earlier program left.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], restart: bool = False) -> None:
        self.path = folder / "checkpoint.pt"
        self._content: dict[str, Any] = {"settings": {**settings, "processes": processes.world()}}
        self._content |= {"results": {}, "run": None, "state": None}
        if not restart and self.path.is_file():
            self._continue()

    @property
    def resumed(self) -> bool:
        """Whether an earlier program left something to go on from."""
        return bool(self._content["results"]) or self._content["run"] is not None

    def result(self, run: str) -> Any:
        """What ``finish`` was told of this run, or None."""
        return self._content["results"].get(run)

    def state(self, run: str) -> Any:
        """What ``save`` was last told of this run, if it is the one that was under way; else None."""
        return self._content["state"] if self._content["run"] == run else None

    def save(self, run: str, state: Any) -> None:
        """Keep the state of the run under way."""
        self._write(run, state)

    def finish(self, run: str, result: Any) -> None:
        """Keep the result of a finished run; its state is dropped."""
        self._content["results"][run] = result
        self._write(None, None)

    def remove(self) -> None:
        """After the results are written: the next program starts from the beginning."""
        if processes.rank() == 0:
            self.path.unlink(missing_ok=True)

    def _write(self, run: str | None, state: Any) -> None:
        self._content |= {"run": run, "state": state}
        if processes.rank() == 0:
            # Whoever is killed while writing leaves the file before it whole.
            partial = self.path.with_suffix(".partial")
            torch.save(self._content, partial)
            os.replace(partial, self.path)

    def _continue(self) -> None:
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            settings = found["settings"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise ExperimentError(f"{self.path} cannot be read; --restart begins anew and replaces it") from error
        mine = self._content["settings"]
        for name in sorted(settings.keys() | mine.keys()):
            if settings.get(name) != mine.get(name):
                raise ExperimentError(
                    f"{self.path} is of an unfinished program with {name} = {settings.get(name)!r}, not "
                    f"{mine.get(name)!r}: start with the same settings to go on, with --restart to begin anew, or with "
                    "another --out"
                )
        self._content = found


def random_state() -> list[dict[str, Tensor]]:
    """The states of torch's global generators, one dict per process (they differ between processes)."""
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()
    return processes.gathered(own)


def set_random_state(states: list[dict[str, Tensor]]) -> None:
    """Back to what ``random_state`` gave."""
    own = states[processes.rank()]
    torch.set_rng_state(own["cpu"])
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])
