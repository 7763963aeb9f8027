"""How the processes of a program end: once the block is left, no thread of gloo's is there that could abort them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# DistributedDataParallel is in reference cycles and imports, when it is made, what would hold the group for ever.
SCRIPT = """
import sys
from pathlib import Path
import torch
from sama_experiments.common import processes

def train():
    model = processes.averaging(torch.nn.Linear(3, 3))
    for _ in range(3):
        model(torch.ones(2, 3)).sum().backward()
    assert processes.total(1) == 2 and "pt_gloo_runloop" in threads()

def threads():
    return [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]

try:
    with processes.joined():
        train()
        {end}
finally:
    assert not any("gloo" in name for name in threads()), threads()
    if processes.world() == 1 and processes.rank() == 0:
        print("nobody left")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("end", ["pass", "sys.exit(0)"])
def test_gloos_threads_end_with_the_block(end: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(end=end))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout.count("nobody left") == 2, done.stderr
