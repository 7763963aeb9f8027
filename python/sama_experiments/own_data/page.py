"""The HTML report: one file with its styles and picture inside; what comes from the user's data is escaped."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .pruning import Line

BINS = 40
WIDTH, HEIGHT, MARGIN = 760, 220, 40  # of the picture, in pixels
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #ddd; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { overflow-wrap: break-word; max-width: 14rem; } .kept { fill: #3a76b0; } .dropped { fill: #d98a3d; }
td.text:last-child { overflow-wrap: anywhere; max-width: none; }
svg text { font-size: 12px; fill: #444; } .key { font-weight: 600; }
"""
TITLES = {
    "suspected": (
        "Suspected label errors",
        "The most suspicious first. Another label was likelier to the model, and the suspicion is above that of nearly "
        "all clean rows. Look at them before you change anything: the model can be wrong.",
    ),
    "worst": ("Lowest weights", "The rows that help the model least on the clean set."),
    "best": ("Highest weights", "The rows that help it most."),
}


def page(
    name: str,
    counts: dict[str, int],
    summary: dict[str, Any],
    weights: Tensor,
    kept: Tensor,
    lines: dict[str, list[Line]],
) -> str:
    """The whole page. weights: float32 [N]; kept: bool [N]; lines: lists by the keys of TITLES."""
    parts = [
        f"<h1>What the rows of {escape(name)} are worth</h1>",
        _table(["", "rows"], [[key, _thousands(count)] for key, count in counts.items()], numbers={1}),
        *_bad_rows(summary),
        "<h2>Weights</h2>",
        "<p>Learned with SAMA, guided by the clean set; their mean is 1. "
        '<span class="key" style="color:#3a76b0">kept</span>, '
        '<span class="key" style="color:#d98a3d">left out</span>.</p>',
        histogram(weights, kept),
    ]
    for key, (title, explanation) in TITLES.items():
        header = ["row", "label", "proposed", "weight", "suspicion", "kept", "text"]
        rows = [
            [
                str(line.row),
                line.label,
                line.proposed_label if line.proposed_label != line.label else "",
                f"{line.weight:.3f}",
                f"{line.suspicion:.3f}",
                "yes" if line.kept else "no",
                line.text,
            ]
            for line in lines[key]
        ]
        parts += [f"<h2>{title}</h2>", f"<p>{explanation}</p>"]
        parts.append(_table(header, rows, numbers={0, 3, 4}) if rows else "<p>None.</p>")
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(name)}: learned weights</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def histogram(weights: Tensor, kept: Tensor) -> str:
    """The weights as bars, those to keep below those left out, as inline SVG."""
    low, high = weights.min().item(), weights.max().item()
    width = max(high - low, 1e-6) / BINS
    bins = ((weights - low) / width).long().clamp(max=BINS - 1)
    below = torch.bincount(bins[kept], minlength=BINS).tolist()
    above = torch.bincount(bins[~kept], minlength=BINS).tolist()
    tallest = max(a + b for a, b in zip(below, above, strict=True))
    step = (WIDTH - 2 * MARGIN) / BINS
    unit = (HEIGHT - 2 * MARGIN) / tallest
    floor = HEIGHT - MARGIN
    bars = []
    for i, (keep, drop) in enumerate(zip(below, above, strict=True)):
        left = MARGIN + i * step
        start = low + i * width
        tip = f"<title>{start:.3f} to {start + width:.3f}: {keep} kept, {drop} left out</title>"
        for kind, count, under in (("kept", keep, 0), ("dropped", drop, keep)):
            if count:
                top = floor - (under + count) * unit
                bars.append(
                    f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{step - 1:.1f}" '
                    f'height="{count * unit:.1f}">{tip}</rect>'
                )
    labels = [(MARGIN, low), (WIDTH / 2, (low + high) / 2), (WIDTH - MARGIN, high)]
    ticks = [f'<text x="{x:.0f}" y="{floor + 16}" text-anchor="middle">{value:.3g}</text>' for x, value in labels]
    line = f'<line x1="{MARGIN}" y1="{floor}" x2="{WIDTH - MARGIN}" y2="{floor}" stroke="#888"/>'
    title = f'<text x="{WIDTH / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">weight</text>'
    most = f'<text x="{MARGIN - 6}" y="{MARGIN + 4}" text-anchor="end">{tallest}</text>'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="histogram of the weights">{line}{"".join(bars)}{"".join(ticks)}{title}{most}</svg>'
    )


def _bad_rows(summary: dict[str, Any]) -> list[str]:
    rows = [
        [f"--{name}", reason, _thousands(count)]
        for name, counts in summary["bad_rows"].items()
        for reason, count in counts.items()
    ]
    if not rows:
        return []
    listed = escape(summary["bad_rows_file"])
    table = _table(["file", "reason", "rows"], rows, numbers={2})
    return ["<h2>Bad rows</h2>", f"<p>They are neither weighed nor kept; each is listed in {listed}.</p>", table]


def _table(header: list[str], rows: list[list[str]], numbers: set[int]) -> str:
    def cells(tag: str, row: list[str]) -> str:
        kinds = [' class="number"' if i in numbers else ' class="text"' for i in range(len(row))]
        return "".join(f"<{tag}{kind}>{escape(value)}</{tag}>" for kind, value in zip(kinds, row, strict=True))

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', header)}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


def _thousands(count: int) -> str:
    return f"{count:,}"
