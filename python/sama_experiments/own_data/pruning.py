"""``sama-kernels prune``: writes the rows of highest weight, or of lowest suspicion, as they are, and a report."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..common.errors import ExperimentError
from . import page, weights_file
from .formats import digest, format_of, open_rows, out_file
from .options import PruneOptions

COLUMNS = ["row", "label", "weight", "suspicion", "suspected", "proposed_label", "confidence"]
EXCERPT = 400  # characters of a text in the report


@dataclass(frozen=True)
class Line:
    """A row in a list of the report."""

    row: int
    text: str
    label: str
    proposed_label: str
    weight: float
    suspicion: float
    kept: bool


def prune(options: PruneOptions, console: Console) -> None:
    """Write ``--out`` and ``--report``."""
    weights, train = Path(options.weights), Path(options.train)
    summary = weights_file.read_summary(weights)
    out, report = _outputs(options, weights, train)
    rows = open_rows("--train", train, summary["text"], summary["label"])
    if digest(train) != summary["settings"]["train"]:
        raise ExperimentError(
            f"--train {train}: is not the file that was weighed, {summary['train']}, or was changed since; "
            "weigh it again"
        )
    table = weights_file.read(weights, summary["classes"], COLUMNS)
    if len(table["row"]) != summary["weighed_rows"]:
        raise ExperimentError(
            f"--weights {weights}: holds {len(table['row'])} rows, not the {summary['weighed_rows']} that were weighed"
        )
    kept = highest(table["weight"] if options.by == "weight" else -table["suspicion"], options.keep)
    mask = bytearray(summary["rows"])
    torch.frombuffer(mask, dtype=torch.uint8)[table["row"]] = kept.to(torch.uint8)
    partial = weights_file.partial_file(out)
    rows.copy(partial, mask)

    lists = _lists(table, options.rows)
    texts = dict.fromkeys(int(table["row"][place]) for places in lists.values() for place in places)
    found = {record.row: record.text for record in rows.scan() if record.row in texts}
    lines = {
        title: [_line(table, place, kept, found, summary["classes"]) for place in places]
        for title, places in lists.items()
    }
    counts = {
        "rows in the file": summary["rows"],
        "bad rows, not weighed": summary["rows"] - summary["weighed_rows"],
        "rows weighed": summary["weighed_rows"],
        "rows kept": int(kept.sum()),
        "suspected label errors": summary["suspected_rows"],
        "of them kept": int((kept & table["suspected"]).sum()),
    }
    html = page.page(str(train), counts, summary, table["weight"], kept, lines)
    report.write_text(html, encoding="utf-8")
    os.replace(partial, out)
    said = ", ".join(f"{number} {name}" for name, number in counts.items())
    console.print(said, soft_wrap=True, highlight=False)
    console.print(f"wrote {out} and {report}", soft_wrap=True, highlight=False)


def highest(weights: Tensor, share: float) -> Tensor:
    """bool [N], the share of highest weights (at least one row); of equal weights the earlier rows."""
    count = max(1, round(share * len(weights)))
    kept = torch.zeros(len(weights), dtype=torch.bool)
    kept[weights.argsort(descending=True, stable=True)[:count]] = True
    return kept


def _outputs(options: PruneOptions, weights: Path, train: Path) -> tuple[Path, Path]:
    out, report = out_file("--out", Path(options.out)), out_file("--report", Path(options.report))
    if format_of("--out", out) != format_of("--train", train):
        raise ExperimentError(f"--out {out}: must end in {train.suffix}, as --train does: rows are kept as they are")
    taken = {
        weights.resolve(): "the file of --weights",
        weights_file.summary_file(weights).resolve(): "what belongs to --weights",
        train.resolve(): "the file of --train",
    }
    for flag, path in (("--out", out), ("--out", weights_file.partial_file(out)), ("--report", report)):
        if path.resolve() in taken:
            raise ExperimentError(f"{flag} {path}: is {taken[path.resolve()]}; name another one")
        taken[path.resolve()] = "the file of --out"
    return out, report


def _lists(table: dict[str, Tensor], rows: int) -> dict[str, list[int]]:
    """Places in the table of the rows that the report lists."""
    order = table["weight"].argsort(descending=True, stable=True)
    suspects = table["suspected"].nonzero().squeeze(1)
    worst = suspects[table["suspicion"][suspects].argsort(descending=True, stable=True)]
    return {
        "suspected": worst[:rows].tolist(),
        "worst": order.flip(0)[:rows].tolist(),
        "best": order[:rows].tolist(),
    }


def _line(table: dict[str, Tensor], place: int, kept: Tensor, texts: dict[int, str], classes: list[str]) -> Line:
    row: dict[str, Any] = {name: column[place].item() for name, column in table.items()}
    text = texts[row["row"]]
    return Line(
        row=row["row"],
        text=text if len(text) <= EXCERPT else text[:EXCERPT] + " …",
        label=classes[row["label"]],
        proposed_label=classes[row["proposed_label"]],
        weight=row["weight"],
        suspicion=row["suspicion"],
        kept=bool(kept[place]),
    )
