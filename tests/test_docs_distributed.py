"""Every code block of docs/distributed.md runs under torchrun, with two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)

# An ordinary end aborts now and then (docs/distributed.md, "If a process aborts as it ends").
LEAVE = "\nimport os, sys\n\nsys.stdout.flush()\nos._exit(0)\n"


@pytest.mark.parametrize("block", range(2))
def test_every_block_runs(block: int, tmp_path: Path) -> None:
    assert len(BLOCKS) == TEXT.count("```") // 2 == 2
    script = tmp_path / "train.py"
    script.write_text(BLOCKS[block] + LEAVE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
