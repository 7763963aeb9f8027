"""Public implementations of the same algorithms, measured beside ours where they are installed.

One module per package, with PACKAGE, the VERSION it was written for, and `cases(task, terms, unrolls)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from bench.algorithm_cases import Case, Task
from bench.measure import installed

MODULES = ("betty", "higher_", "torchopt_")


def cases(task: Task, terms: int, unrolls: Sequence[int]) -> tuple[list[Case], list[str]]:
    """The cases of all peers that are installed, and a line about each that is not."""
    found: list[Case] = []
    missing = []
    for name in MODULES:
        peer = importlib.import_module(f"bench.peers.{name}")
        if installed(peer.PACKAGE) is None:
            missing.append(f"{peer.PACKAGE} is not installed and was left out (written for {peer.VERSION})")
        else:
            found += peer.cases(task, terms, unrolls)
    return found, missing
