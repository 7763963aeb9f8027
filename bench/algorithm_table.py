"""The Markdown of `bench.algorithms`, with the paper's figures beside ours."""

from __future__ import annotations

from typing import Any

from bench.report import distinct, find, processor

Row = dict[str, Any]

# Paper, Tables 8 (AGNews) and 9 (IMDB), one V100: samples/s and GB. Table 2, AGNews: the same, global batch 48.
PAPER = {
    "plain finetuning": {"8": (169.16, 7.77), "9": (144.39, 6.60)},
    "iterative": {"8": (28.07, 22.94), "9": (24.24, 22.03)},
    "conjugate_gradient": {"8": (65.14, 22.03), "9": (56.27, 21.92), "2": (82.1, 28.4)},
    "neumann": {"8": (67.03, 19.70), "9": (57.85, 19.75), "2": (82.9, 26.0)},
    "t1_t2": {"8": (43.69, 10.81), "9": (37.53, 10.35)},
    "sama_na": {"8": (137.90, 10.30), "9": (117.86, 9.93), "2": (144.1, 13.7)},
    "sama": {"8": (134.56, 11.12), "9": (116.94, 10.84), "2": (142.0, 14.3)},
}
PAPER_UNROLL = 10  # Table 4
COLUMNS = (
    "algorithm", "implementation", "samples/s [p10, p90]", "× finetuning", "meta step, ms [p10, p90]", "peak, MB",
    "× finetuning",
)  # fmt: skip
PAPER_COLUMNS = (
    "paper: throughput × finetuning (Tables 8, 9)", "paper: memory × finetuning (8, 9)",
    "paper: samples/s, GB (Table 2)",
)  # fmt: skip


def markdown(rows: list[Row]) -> str:
    """What was run, a table per unroll length, and how the peers' meta gradients compare with ours."""
    figures = [row for row in rows if row["record"] == "algorithm"]
    parts = [heading(rows[0])]
    for unroll in distinct(figures, "unroll"):
        parts.append(f"**{unroll} base step{'s' * (unroll > 1)} per meta step**")
        parts.append(table([row for row in figures if row["unroll"] == unroll]))
        if unroll == PAPER_UNROLL:
            parts.append(
                "The paper's columns: BERT-base on one V100, real texts, another batch, length and inner terms;"
                " at most the ratios can be compared. Its DARTS / T1-T2 is in the row `t1_t2`."
            )
    if agreed := [row for row in rows if row["record"] == "agreement"]:
        parts.append("Meta gradients of the others against ours, on a toy BERT without dropout:")
        parts.append("\n".join(f"- {agreement(row)}" for row in agreed))
    parts.append("\n".join(f"- {line}" for line in rows[0]["missing_peers"]))
    settings = dict.fromkeys((r["name"], r["source"], r["settings"]) for r in figures if r["settings"])
    parts.append("Settings:\n\n" + "\n".join(f"- `{name}` of {source}: `{value}`" for name, source, value in settings))
    return "\n\n".join(part for part in parts if part)


def heading(about: Row) -> str:
    where, settings = about["machine"], about["settings"]
    on = where["gpu"] or processor(where, where["torch_threads"])
    parts = [on, f"torch {where['versions']['torch']}", f"transformers {where['versions']['transformers']}"]
    parts += [f"commit {where['commit']}", f"load {where['load']:.1f} before"]
    batch = f"batch {settings['batch']}, {settings['tokens']} tokens, {settings['terms']} products with the Hessian"
    text = f"{', '.join(parts)}. Model {settings['model']}, {batch}, {about['attention']} attention."
    text += " Sizes for a trial, not a result." if settings["quick"] else ""
    return text + (" **Disturbed: others were using the machine.**" if about["disturbed"] else "")


def table(rows: list[Row]) -> str:
    """One unroll length."""
    with_paper = rows[0]["unroll"] == PAPER_UNROLL
    names = [*COLUMNS, *(PAPER_COLUMNS if with_paper else ())]
    lines = [f"| {' | '.join(names)} |", "|---|---|" + "---:|" * (len(names) - 2)]
    for row in rows:
        cells = [
            f"`{row['name']}`",
            row["source"],
            numbers(row["samples_per_s"], 1),
            f"{row['throughput_of_plain'][0]:.2f}",
        ]
        cells += [numbers(row["meta_step_s"], 1e3) if row["meta_step_s"] else ""]
        cells += [f"{row['live_bytes'] / 1e6:.1f}", f"{row['memory_of_plain']:.2f}"]
        lines.append(f"| {' | '.join([*cells, *(paper(row['name']) if with_paper else ())])} |")
    return "\n".join(lines)


def numbers(values: tuple[float, float, float], factor: float) -> str:
    median, low, high = (f"{factor * value:#.3g}".rstrip(".") for value in values)
    return f"{median} [{low}, {high}]"


def paper(name: str) -> list[str]:
    """The paper's cells of one algorithm; empty where it has none."""
    if name not in PAPER:
        return ["", "", ""]
    plain, mine = PAPER["plain finetuning"], PAPER[name]
    ratios = [[mine[t][i] / plain[t][i] for t in ("8", "9")] for i in (0, 1)]
    samples, gigabytes = mine.get("2", (None, None))
    return [*(f"{a:.2f}, {b:.2f}" for a, b in ratios), f"{samples}, {gigabytes}" if samples else ""]


def agreement(row: Row) -> str:
    """How one peer's meta gradient compares with ours, in words."""
    if row["differs"]:
        verdict = f"another function: {row['differs']}"
    else:
        verdict = "the same" if row["same"] else "NOT the same, although it should be"
    return f"{row['key']}: cosine {row['cosine']:.6f}, distance {row['distance']:.1e}: {verdict}"


def ladder(rows: list[Row]) -> str:
    """Peak memory, MB and the multiple of plain finetuning, per algorithm and size."""
    found = [row for row in rows if row["record"] == "ladder"]
    sizes = distinct(found, "parameters")
    lines = [
        f"| algorithm | {' | '.join(f'{n / 1e6:.3g} M parameters' for n in sizes)} |",
        "|---|" + "---:|" * len(sizes),
    ]
    for name in distinct(found, "name"):
        cells = []
        for size in sizes:
            row = find(found, name=name, parameters=size)
            assert row is not None
            cells.append(f"{row['live_bytes'] / 1e6:.1f} MB, {row['memory_of_plain']:.2f} ×")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    about = {**rows[0], "settings": {**rows[0]["settings"], "model": "RoBERTa-shaped"}}
    return heading(about) + "\n\n" + "\n".join(lines)
