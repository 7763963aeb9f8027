"""Tables and a plot from what `bench.scaling` has measured: `python -m bench.scaling_report [--write PAGE] FILE...`.

The tables go to the terminal and, with --write, between `<!-- bench:scaling -->` and `<!-- /bench:scaling -->` of PAGE.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.measure import disturbed
from bench.model import measured_table
from bench.model_checks import compare_measured
from bench.model_steps import LABEL
from bench.report import ReportError, milliseconds, processor, read, write_between_markers

BEGIN, END = "<!-- bench:scaling -->", "<!-- /bench:scaling -->"
Row = dict[str, Any]
LAMBDAS = {
    "small": "λ of {:,} elements (a Meta-Weight-Net), replicated",
    "large": "λ of {:,} elements (a factor on every weight of the encoder), under FSDP2 sharded as θ is",
}
NAMES = [
    "processes", "mode", "step", "ms [p10, p90]", "× base step", "samples/s", "training", "collectives", "payload MB",
    "wire MB", "written MB", "hidden", "peak MB",
]  # fmt: skip


def steps_of(records: list[Row]) -> list[Row]:
    return [row for row in records if row["kind"] == "step"]


def heading(records: list[Row]) -> str:
    """On what, of what, and what the figures are not."""
    first, about = steps_of(records)[0], records[0]["machine"]
    where = about["gpu"] if first["device"] == "cuda" else processor(about, about["cpus"])
    parts = [
        where, f"torch {about['versions']['torch']}", first["backend"], f"commit {about['commit']}",
        f"load {about['load']:.1f} before the run", f"{first['rounds']} rounds",
    ]  # fmt: skip
    batch = f"{first['samples']} samples on all processes together" if first["strong"] else (
        f"{first['batch']} samples per process"
    )  # fmt: skip
    command = f"python -m bench.scaling{' --strong' * first['strong']}"
    text = (
        f"**Measured.** {', '.join(parts)}. BERT ({first['model']}), θ of {first['theta_elements']:,} elements, fp32;"
        f" {batch}, of {first['tokens']} tokens; buckets of {first['bucket_mib']} MiB. Repeat with `{command}`."
    )
    if disturbed(about):
        text += " **Other programs ran on this machine: the times are disturbed.**"
    if first["quick"]:
        text += " **--quick: a trial, not a result.**"
    return text + warning(records)


def warning(records: list[Row]) -> str:
    """That processes on one machine share it."""
    steps = steps_of(records)
    cpus = steps[0]["cpus"]
    over = sorted({r["processes"] for r in steps if r["oversubscribed"]})
    text = ""
    if steps[0]["device"] == "cpu" and max(r["processes"] for r in steps) > 1:
        text += (
            f"\n\nAll processes share {cpus} CPUs, as CPUs / processes threads each, and one memory: more of them bring"
            " no more hardware, so that samples/s are not those of a cluster. Processes with one thread are to be"
            " compared with one process with one thread."
        )
    if over:
        text += (
            f" **{', '.join(map(str, over))} processes on {cpus} CPUs are oversubscribed (marked ⚠): their times"
            " are not scaling.**"
        )
    return text


def table(steps: list[Row]) -> str:
    """A line per step."""
    lines = [f"| {' | '.join(NAMES)} |", "|---|---|---|" + "---:|" * (len(NAMES) - 3)]
    for r in steps:
        processes = f"{r['processes']} × {r['threads']} thread{'s' * (r['threads'] > 1)}{' ⚠' * r['oversubscribed']}"
        name = "base step" if r["step"] == "base" else f"meta, {r['sync']}"
        ms = f"{milliseconds(r['median_s'])} [{milliseconds(r['p10_s'])}, {milliseconds(r['p90_s'])}]"
        over = f"{r['over_base']['median']:.2f}" if "over_base" in r else ""
        training = f"{r['training_samples_per_s']:.1f}" if "over_base" in r else ""
        sent = [r[key] for key in ("payload_bytes", "bytes_on_wire", "bytes_written")]
        cells = [
            processes, "DDP" if r["mode"] == "ddp" else "FSDP2", name, ms, over, f"{r['samples_per_s']:.1f}", training,
            r["collectives"], *("" if x is None else f"{x / 1e6:.4g}" for x in sent),
            "" if r["hidden_share"] is None else f"{r['hidden_share']:.0%}", f"{r['peak_memory'] / 1e6:,.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def markdown(path: Path) -> str:
    """All tables of a file."""
    records = read(path)
    steps = steps_of(records)
    parts = [heading(records)]
    for lam in dict.fromkeys(row["lambda"] for row in steps):
        chosen = [row for row in steps if row["lambda"] == lam]
        parts.append(f"{LAMBDAS[lam].format(chosen[0]['lambda_elements'])}:\n\n{table(chosen)}")
    parts.append(
        "(`samples/s`: of all processes, if only such steps were made; `training`: with ten base steps per meta step."
        f" Bytes are per rank: {steps[0]['counted']}; `written`: what the kernel counts. `hidden`:"
        f" {steps[0]['hidden_share_method']}. `peak`: live bytes of a rank.)"
    )
    if links := [row for row in records if row["kind"] == "link"]:
        times = ", ".join(f"{row['bytes']:,} bytes {row['seconds'] * 1e3:.3g} ms" for row in links)
        parts.append(f"An all-reduce between two processes takes: {times}.\n\n{prediction(path)}")
    return "\n\n".join(parts)


def prediction(path: Path) -> str:
    """The model's steps beside the measured ones; if the link cannot be fitted: why."""
    try:
        rows = compare_measured(path)
    except ReportError as error:
        return f"No prediction: {error}"
    link = f"{rows[0]['alpha_s'] * 1e6:.0f} µs + bytes / ({rows[0]['bytes_per_s'] / 1e9:.2f} GB/s) per message"
    return (
        f"Measured here, and predicted (the predictions are {LABEL}) from one process with as many threads, the bytes"
        f" and hidden shares above, and {link}, fitted to these times. Times in ms.\n\n{measured_table(rows)}"
    )


def report(path: Path, plot: bool, page: Path | None) -> None:
    """Print, draw beside the file, and write into a page if there is one."""
    text = markdown(path)
    print(text)
    if plot:
        from bench import plots

        records = read(path)
        plots.measured_scaling(steps_of(records), path.with_suffix(".png"), disturbed(records[0]["machine"]))
    if page is not None:
        write_between_markers(page, text, BEGIN, END)


def main(arguments: list[str] | None = None) -> int:
    """Print, draw, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=Path("bench/results/scaling_cpu.jsonl"))
    parser.add_argument("--write", type=Path, metavar="PAGE")
    parser.add_argument("--no-plots", action="store_true")
    options = parser.parse_args(arguments)
    try:
        report(options.file, not options.no_plots, options.write)
    except (ReportError, OSError) as error:
        parser.exit(1, f"bench.scaling_report: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
