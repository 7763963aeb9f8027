"""Kill a program when its checkpoint has appeared, start it again, and compare with one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def killed_and_resumed(module: str, arguments: list[str], out: Path, wait: float = 120.0) -> None:
    """Start ``python -m module arguments --out out``, SIGKILL it once it has left a checkpoint, and start it again.

    The second start must say that it goes on, and end well.
    """
    command = [sys.executable, "-m", module, *arguments, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + wait
    while not (out / "checkpoint.pt").exists():
        assert process.poll() is None, f"it ended before it had left a checkpoint: {process.communicate()[1]}"
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed: take more steps"
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=wait)
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stdout
    assert not (out / "checkpoint.pt").exists()


def undisturbed(module: str, arguments: list[str], out: Path, wait: float = 120.0) -> None:
    """The same in one go."""
    command = [sys.executable, "-m", module, *arguments, "--out", str(out)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=wait
    )
    assert done.returncode == 0, done.stderr
    assert "going on from" not in done.stdout


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())
