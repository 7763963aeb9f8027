"""What limits the kernels, from Nsight Compute's counters: `python -m bench.profile [--out FOLDER]` (a GPU and `ncu`).

Every op runs once on 1e8 elements under `ncu`, which measures its kernel many times over with cold caches. Written to
profile_cuda.jsonl, a line for each op and dtype, and printed as a table:
    bytes / element   what memory read and wrote, beside what the op's docstring states
    memory            the share of the peak bandwidth of memory that was in use (a copy cannot reach all of it either)
    issue             the share of cycles in which a scheduler issued an instruction
    occupancy         the share of the warps that fit on a multiprocessor which were there, and registers of a thread
    instructions      of a warp, for 32 elements
    waiting           for what warps waited longest, in cycles for each instruction issued
The clocks are left alone. Times under a profiler are not those of `bench.kernels`, which say how fast a kernel is.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.cases import Op, op_list
from bench.contenders import Library
from bench.inputs import PRECISIONS, Inputs
from bench.measure import machine

ELEMENTS = 100_000_000
OPS = (
    "adapt_norm_adam", "adapt_norm_adam8bit", "adapt_norm_rmsprop", "adapt_norm_nadam", "adapt_norm_adadelta",
    "adapt_norm_scale", "perturb_plus", "perturb_minus", "restore", "central_difference", "perturb_plus_stochastic",
    "perturb_plus_measured", "perturb_plus_both",
)  # fmt: skip
KERNELS = "regex:(adam|moments|scale|plus|minus|restore|difference)_kernel"  # the one of an op that is model-sized
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats", "InstructionStats",
            "ComputeWorkloadAnalysis")  # fmt: skip
METRICS = {  # Nsight Compute's names
    "nanoseconds": "gpu__time_duration.sum",
    "bytes_read": "dram__bytes_read.sum",
    "bytes_written": "dram__bytes_write.sum",
    "memory_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "warp_instructions": "smsp__inst_executed.sum",
    "clock_hz": "smsp__cycles_elapsed.avg.per_second",
}
WAITS = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
PIPES = "sm__inst_executed_pipe_", ".avg.pct_of_peak_sustained_active"


def run_ops(dtype: str, names: Sequence[str], backend: str, elements: int) -> None:
    """Every op once, with the profiler on for that call alone."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    inputs = Inputs([(elements,)], PRECISIONS[dtype], device)
    library = Library(
        inputs, backend, ([torch.empty_like(x) for x in inputs.theta], [torch.empty_like(x) for x in inputs.d])
    )
    with torch.no_grad():
        for op in chosen(dtype, names):
            op.begin(library)
            op.call(library)  # compiles, allocates
            op.begin(library)
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            op.call(library)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def chosen(dtype: str, names: Sequence[str]) -> list[Op]:
    return [op for op in op_list(PRECISIONS[dtype]) if op.name in names]


def profiled(ncu: str, dtype: str, names: Sequence[str], backend: str, elements: int) -> list[dict[str, str]]:
    """One table row of Nsight Compute for each op; its columns are metrics."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log.csv")
        command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--kernel-name", KERNELS]
        command += [argument for section in SECTIONS for argument in ("--section", section)]
        command += ["--metrics", ",".join(METRICS.values()), "--csv", "--page", "raw", "--print-units", "base"]
        command += ["--log-file", str(log), sys.executable, "-m", "bench.profile", "--worker"]
        command += ["--dtypes", dtype, "--backend", backend, "--elements", str(elements), "--ops", *names]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = log.read_text().splitlines() if log.is_file() else []
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if done.returncode != 0 or first is None:
        raise SystemExit("\n".join(["bench.profile: ncu failed:", done.stdout, done.stderr, *lines])[-4000:])
    rows = list(csv.DictReader(lines[first:]))[1:]  # the first one has the units
    if len(rows) != len(names):
        raise SystemExit(
            f"bench.profile: {len(names)} ops, but {len(rows)} kernels: {[r['Kernel Name'] for r in rows]}"
        )
    return rows


def number(text: str) -> float | None:
    """As ncu writes it: with commas between thousands, or 'n/a'."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def named(row: dict[str, str], around: tuple[str, str]) -> dict[str, float]:
    """Metrics whose names begin and end so, by what is between, the largest first."""
    begin, end = around
    found = {k[len(begin) : -len(end)]: number(x) for k, x in row.items() if k.startswith(begin) and k.endswith(end)}
    present = {k: x for k, x in found.items() if x is not None}
    return dict(sorted(present.items(), key=lambda item: -item[1]))


def record(op: Op, dtype: str, backend: str, elements: int, row: dict[str, str]) -> dict[str, Any]:
    """What is kept of a row."""
    values = {name: number(row.get(metric, "")) for name, metric in METRICS.items()}
    return {
        "op": op.name, "dtype": dtype, "backend": backend, "elements": elements, "kernel": row["Kernel Name"],
        "stated_bytes_per_element": op.bytes_per_element, **values, "waits": named(row, WAITS),
        "pipes_percent": named(row, PIPES),
    }  # fmt: skip


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| op | dtypes | bytes / element, stated | memory | issue | occupancy, registers | instructions | waiting |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for r in records:
        moved = ((r["bytes_read"] or 0.0) + (r["bytes_written"] or 0.0)) / r["elements"]
        waits = ", ".join(f"{name} {cycles:.1f}" for name, cycles in list(r["waits"].items())[:3])
        cells = [
            f"`{r['op']}`",
            r["dtype"],
            f"{moved:.2f}, {r['stated_bytes_per_element']}",
            f"{r['memory_percent']:.0f} %",
            f"{r['issue_percent']:.0f} %",
            f"{r['occupancy_percent']:.0f} %, {r['registers']:.0f}",
            f"{r['warp_instructions'] / r['elements'] * 32:.1f}",
            waits,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Profile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--dtypes", nargs="+", choices=list(PRECISIONS), default=["fp32", "bf16"])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--backend", choices=["cuda", "triton"], default="cuda")
    parser.add_argument("--elements", type=int, default=ELEMENTS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        run_ops(options.dtypes[0], options.ops, options.backend, options.elements)
        return 0
    ncu = shutil.which("ncu", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]))
    if ncu is None or not torch.cuda.is_available():
        missing = "ncu (Nsight Compute) in PATH or /usr/local/cuda/bin" if ncu is None else "a GPU that torch sees"
        print(f"bench.profile: needs {missing}", file=sys.stderr)
        return 3
    records = []
    for dtype in options.dtypes:
        ops = chosen(dtype, options.ops)
        rows = profiled(ncu, dtype, [op.name for op in ops], options.backend, options.elements)
        records += [record(op, dtype, options.backend, options.elements, r) for op, r in zip(ops, rows, strict=True)]
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [{"machine": machine()}, *records]
    (options.out / "profile_cuda.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(table(records))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
