"""Plots and the Markdown table from the results of `bench.kernels`: `python -m bench.report [--write]`.

Reads RESULTS/kernels_<device>.jsonl, draws RESULTS/kernels_<device>.png (share of the copy bandwidth, and speedup over
the baselines, per op, list and dtype) and prints the tables; with --write they replace what stands between
`<!-- bench:kernels -->` and `<!-- /bench:kernels -->`: those of the CPU in README.md, those of the GPU in docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- bench:kernels -->", "<!-- /bench:kernels -->"
FUSED = ("cpu", "cuda", "triton")
BASELINES = {"reference": "eager", "foreach": "`_foreach_*`", "compile": "`torch.compile`"}
Row = dict[str, Any]


class ReportError(Exception):
    """What the user can put right, in one line."""


def read(path: Path) -> list[Row]:
    """The JSON lines of one run."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    except json.JSONDecodeError as error:
        raise ReportError(f"{path}: not JSON lines ({error}); was the run cut off?") from error
    if not rows:
        raise ReportError(f"{path} is empty")
    return rows


def measured(rows: Iterable[Row]) -> list[Row]:
    """Without the notes on what was not measured."""
    return [row for row in rows if "median_s" in row]


def find(rows: Iterable[Row], **wanted: Any) -> Row | None:
    """The row with these values; None if there is none."""
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def distinct(rows: Iterable[Row], key: str) -> list[Any]:
    """The values of `key`, in the order in which they first occur."""
    return list(dict.fromkeys(row[key] for row in rows))


def markdown(rows: list[Row]) -> str:
    """What the figures were measured on, a table per dtype and list, and what could not be measured."""
    times = measured(rows)
    if not times:
        raise ReportError("nothing was measured in this run: " + "; ".join(notes(rows)))
    parts = [heading(rows)]
    for list_name in distinct(times, "list"):
        for dtype in distinct([row for row in times if row["list"] == list_name], "dtype"):
            parts.append(table([row for row in times if row["list"] == list_name and row["dtype"] == dtype]))
    if missing := notes(rows):
        parts.append("Not measured:\n\n" + "\n".join(f"- {text}" for text in missing))
    return "\n\n".join(parts)


def notes(rows: Iterable[Row]) -> list[str]:
    return [row["note"] for row in rows if "note" in row]


def on_gpu(rows: list[Row]) -> bool:
    return any(row["device"] == "cuda" for row in measured(rows))


def heading(rows: list[Row]) -> str:
    first, about = measured(rows)[0], rows[0]["machine"]
    versions = about["versions"]
    where = f"{about['gpu']}, driver {about.get('driver')}" if on_gpu(rows) else processor(about, first["threads"])
    parts = [where, f"torch {versions['torch']}"]
    if on_gpu(rows):
        parts += [f"CUDA {versions.get('cuda')}", f"Triton {versions.get('triton')}"]
    commits = ", ".join(dict.fromkeys(row["machine"]["commit"] for row in rows))
    parts += [f"commit {commits}", f"fewest and most rounds: {round_numbers(rows)}"]
    shrunk = f" Sizes scaled by {first['scale']}: a trial, not a result." if first["scale"] != 1 else ""
    return f"{', '.join(parts)}. Repeat with `python -m bench.kernels`.{shrunk}"


def processor(about: Row, threads: int) -> str:
    return f"{about['processor']} ({about['isa']}), {threads} of {about['cpus']} CPUs"


def round_numbers(rows: list[Row]) -> str:
    numbers = [row["rounds"] for row in measured(rows)]
    return f"{min(numbers)} and {max(numbers)}"


def table(rows: list[Row]) -> str:
    """The ops of one list and dtype: per fused backend time and share of the copy, and its ratio to the baselines."""
    backends = [name for name in FUSED if any(row["contender"] == name for row in rows)]
    against = [name for name in BASELINES if any(f"speedup_over_{name}" in row for row in rows)]
    names = ["op", "bytes per element"]
    for backend in backends:
        names += [f"{backend}: ms [p10, p90]", "of the copy", *(f"× {BASELINES[name]}" for name in against)]
    lines = [f"| {' | '.join(names)} |", "|---|" + "---:|" * (len(names) - 1)]
    for op in distinct(rows, "op"):
        found = [find(rows, op=op, contender=backend) for backend in backends]
        if not any(found):
            continue
        cells = [f"`{op}`", str(next(row for row in found if row)["bytes_per_element"] or "")]
        for row in found:
            cells += backend_cells(row, against)
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]
    count = f"{first['tensors']:,} tensor{'s' * (first['tensors'] != 1)}, {first['elements']:,} elements"
    title = f"**{first['list']}**, {first['dtype']}: {count}"
    if yardstick := find(rows, op="adam_step", contender="torch fused"):
        title += f" (torch's fused Adam step: {milliseconds(yardstick['median_s'])} ms)"
    return title + "\n\n" + "\n".join(lines)


def backend_cells(row: Row | None, against: list[str]) -> list[str]:
    """Time, share of the copy and speedups of one backend; empty where it was not measured."""
    if row is None:
        return [""] * (2 + len(against))
    spread = f"{milliseconds(row['median_s'])} [{milliseconds(row['p10_s'])}, {milliseconds(row['p90_s'])}]"
    share = f"{row['of_copy']:.0%}" if row["bytes_per_element"] else ""
    speedups = [row.get(f"speedup_over_{name}") for name in against]
    return [spread, share, *("" if value is None else f"{value:.1f}" for value in speedups)]


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def write_between_markers(path: Path, text: str, first: str = BEGIN, last: str = END) -> None:
    """Replace what stands between the markers."""
    content = path.read_text()
    begin, end = content.find(first), content.find(last)
    if begin < 0 or end < begin:
        raise ReportError(f"{path} has no {first} before a {last}: add both where the tables belong")
    path.write_text(f"{content[: begin + len(first)]}\n{text}\n{content[end:]}")


def main(arguments: list[str] | None = None) -> int:
    """Draw, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("bench/results"), metavar="FOLDER")
    parser.add_argument("--write", action="store_true", help="put the tables into these pages:")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="those of the CPU")
    parser.add_argument("--gpu-page", type=Path, default=Path("docs/gpu.md"), help="those of the GPU")
    parser.add_argument("--no-plots", action="store_true")
    options = parser.parse_args(arguments)
    try:
        files = sorted(options.results.glob("kernels_*.jsonl"))
        if not files:
            raise ReportError(f"{options.results} has no kernels_*.jsonl: run `python -m bench.kernels --out FOLDER`")
        runs = {path: read(path) for path in files}
        tables = {options.gpu_page if on_gpu(rows) else options.readme: markdown(rows) for rows in runs.values()}
        if not options.no_plots:
            from bench import plots

            for path, rows in runs.items():
                plots.draw(measured(rows), path.with_suffix(".png"))
        print("\n\n".join(tables.values()))
        if options.write:
            for page, text in tables.items():
                write_between_markers(page, text)
    except ReportError as error:
        parser.exit(1, f"bench.report: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
