"""What the model of bench/model_steps.py says about throughputs that others, or `python -m bench.scaling`, measured.

One number is free: the share of the peak FLOP/s that the passes achieve. It is taken from the smallest run of a
published series, so that this one is met exactly; the others are then predicted, and the error is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.alpha_beta import H100_HBM2E, V100_NVLINK, V100_PCIE, Cluster, Link
from bench.model_steps import BERT_BASE, BUCKET, LABEL, LLAMA_8B, Run, base_step, meta_step
from bench.report import ReportError, read

Row = dict[str, Any]

# SAMA's samples per second on 1, 2, 4 V100s (paper, Tables 2, 8 and 9). Table 2: a global batch of 48, so that a GPU
# has 48, 24, 12; the others do not say. Table 4: ten base steps per meta step. Nothing says how the GPUs are linked,
# which precision is used (float32 here), how long the texts are (128 tokens here: only tokens / share matters), or how
# large the meta batch is (as the base batch here).
PAPER = {
    "Table 2, AGNews": {1: 142.0, 2: 241.2, 4: 396.7},
    "Table 8, AGNews": {1: 134.56, 2: 226.27, 4: 298.28},
    "Table 9, IMDB": {1: 116.94, 2: 196.48, 4: 263.74},
}
GLOBAL_BATCH, UNROLL, TOKENS = 48, 10, 128

# Tokens per second and GPU of Llama 3.1 8B on 8 and 128 H100s, plain training with FSDP2, 2 sequences (of 8192 tokens,
# its default) per GPU: torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, Tables 1 and 3.
TORCHTITAN = {"torch.compile": {8: 6667.0, 128: 6514.0}, "eager": {8: 5762.0, 128: 5605.0}}


STEP_FIELDS = ("processes", "mode", "sync", "samples_per_s", "samples", "bytes_on_wire", "hidden_share")
SAME = ("mode", "step", "lambda", "threads")  # what a step of one process should have in common with the others


def solve(rising: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The argument at which a rising function has this value, to the last bit, by bisection."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return high


def paper_throughput(cluster: Cluster, gpus: int, share: float, per_step: float = 0.0) -> float:
    """Samples per second of UNROLL base steps and a meta step; `per_step`: seconds that no GPU shares with others."""
    run = Run(BERT_BASE, cluster, gpus, "ddp", share, tokens=GLOBAL_BATCH / gpus * TOKENS)
    seconds = UNROLL * base_step(run).seconds + meta_step(run, "final").seconds + (UNROLL + 1) * per_step
    return UNROLL * GLOBAL_BATCH / seconds


def calibrated(throughput: Callable[[float], float], measured: float) -> float:
    """The share of the peak at which the model has this throughput."""
    return solve(throughput, measured, 1e-6, 1e3)


def against_paper() -> list[Row]:
    """Tables 2, 8, 9, each on both links; and what one more number, taken from two GPUs, would make of four."""
    clusters = (V100_NVLINK, V100_PCIE)
    return [row for name, reported in PAPER.items() for cluster in clusters for row in series(name, reported, cluster)]


def series(name: str, reported: dict[int, float], cluster: Cluster) -> list[Row]:
    """One table of the paper: with one free number, and with a second, the seconds that every step takes anyhow."""

    def throughput(gpus: int, per_step: float) -> float:
        return paper_throughput(cluster, gpus, share(per_step), per_step)

    def share(per_step: float) -> float:
        return calibrated(lambda s: paper_throughput(cluster, 1, s, per_step), reported[1])

    longest = 0.99 * UNROLL * GLOBAL_BATCH / reported[1] / (UNROLL + 1)
    rows = []
    for per_step in (0.0, solve(lambda c: -throughput(2, c), -reported[2], 0.0, longest)):
        about = {"series": name, "on": cluster.name, "share_of_peak": share(per_step), "seconds_per_step": per_step}
        for gpus, value in reported.items():
            fitted = gpus == 1 or (gpus == 2 and per_step > 0)
            rows.append({**about, **compared(gpus, value, throughput(gpus, per_step), fitted)})
    return rows


def compared(gpus: int, reported: float, predicted: float, fitted: bool) -> Row:
    """A reported throughput and a predicted one; `fitted`: the model was fitted to it."""
    error = predicted / reported - 1
    return {
        "gpus": gpus,
        "reported": reported,
        "predicted": predicted,
        "error": error,
        "fitted": fitted,
        "label": LABEL,
    }


def torchtitan_throughput(gpus: int, share: float) -> float:
    """Tokens per second and GPU of a base step."""
    run = Run(LLAMA_8B, H100_HBM2E, gpus, "fsdp2", share, LLAMA_8B.tokens)
    return run.tokens / base_step(run).seconds


def h100_share(series: str = "torch.compile") -> float:
    """The share of the peak that torchtitan's run on 8 GPUs achieves, in FLOPs of 6 N per token."""
    return calibrated(lambda share: torchtitan_throughput(8, share), TORCHTITAN[series][8])


def against_torchtitan() -> list[Row]:
    """The base step alone, on 8 and 128 GPUs."""
    rows = []
    for series, reported in TORCHTITAN.items():
        share = h100_share(series)
        about = {"series": series, "on": H100_HBM2E.name, "share_of_peak": share, "seconds_per_step": 0.0}
        for gpus, value in reported.items():
            rows.append({**about, **compared(gpus, value, torchtitan_throughput(gpus, share), gpus == 8)})
    return rows


def fitted_link(records: list[Row]) -> Link:
    """alpha and bandwidth from the seconds of all-reduces between two processes, 2 alpha + bytes / bandwidth.

    Relative errors are minimised, as the sizes differ by orders of magnitude.
    """
    if len({row["bytes"] for row in records}) < 2:
        raise ReportError('records of kind "link" with at least two different sizes are needed to fit alpha and beta')
    size, seconds = (torch.tensor([float(row[key]) for row in records]).double() for key in ("bytes", "seconds"))
    columns = torch.stack([2 / seconds, size / seconds], dim=1)
    ones = torch.ones(len(records), 1, dtype=torch.float64)
    alpha, per_byte = torch.linalg.lstsq(columns, ones, driver="gelsd").solution.flatten().tolist()
    if alpha < 0 or per_byte <= 0:
        raise ReportError(
            f"the link times do not grow as alpha + bytes / bandwidth: {alpha:.3g} s, {per_byte:.3g} s/byte"
        )
    return Link(alpha, 1 / per_byte)


def compare_measured(path: Path) -> list[Row]:
    """Steps measured with gloo on a CPU against this model, relative to one process.

    Arguments:
        path: JSON lines of `python -m bench.scaling`. Records of kind "link" have `bytes` and `seconds` of an
            all-reduce between two processes. Those of steps have `processes`, `mode`, `sync`, `samples_per_s`,
            `samples` (of one step, all processes together), `bytes_on_wire` (sent by one process in one step) and
            `hidden_share` (of its communication, None if there is none); also `collectives` in one step, by default the
            buckets of 25 MiB; and `step` ("base" or "meta"), `lambda`, `threads`, by which the step of one process is
            chosen that the others are related to.
    Returns:
        A row per step record of several processes: seconds `measured`, `predicted` (with its hidden share), `lowest`
        (all hidden that fits beside the computation), `highest` (nothing hidden), `relative` (predicted over one
        process), `error` of the prediction. The computation is that of one process with as many samples; processes
        that share the cores of one machine are slower than that, which shows as error.
    Raises:
        ReportError: sizes, fields or a run with one process are missing.
    """
    records = read(path)
    link = fitted_link([row for row in records if row.get("kind") == "link"])
    steps = [row for row in records if "samples_per_s" in row]
    if missing := {field for field in STEP_FIELDS for row in steps if field not in row}:
        raise ReportError(f"{path}: step records without {', '.join(sorted(missing))}")
    rows = []
    for row in (row for row in steps if row["processes"] > 1):
        alone = [one for one in steps if one["processes"] == 1]
        if not alone:
            raise ReportError(f"{path}: no record with processes 1 to relate the others to")
        one = max(alone, key=lambda one: sum(one.get(key) == row.get(key) for key in SAME))
        others = row["processes"] - 1
        single = one["samples"] / one["samples_per_s"]
        compute = single * row["samples"] / row["processes"] / one["samples"]
        collectives = row.get("collectives", math.ceil(row["bytes_on_wire"] / BUCKET))
        messages = collectives * others * (2 if row["mode"] == "ddp" else 1)
        communication = messages * link.alpha + row["bytes_on_wire"] / link.bandwidth
        predicted = compute + (1 - (row["hidden_share"] or 0.0)) * communication
        measured = row["samples"] / row["samples_per_s"]
        rows.append({
            **{key: row.get(key) for key in ("processes", "sync", *SAME)}, "label": LABEL, "measured": measured,
            "predicted": predicted, "lowest": max(compute, communication), "highest": compute + communication,
            "relative": predicted / single, "error": predicted / measured - 1, "alpha_s": link.alpha,
            "bytes_per_s": link.bandwidth,
        })  # fmt: skip
    return rows
