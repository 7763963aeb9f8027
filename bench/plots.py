"""The plots of `bench.report`: bars per op and contender, a row of panels per list and dtype; those of `bench.model`
and `bench.algorithms`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, or there
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

Row = dict[str, Any]
COLOURS = {
    "cpu": "tab:blue", "cuda": "tab:blue", "triton": "tab:cyan", "foreach": "tab:orange", "compile": "tab:green",
    "reference": "tab:gray",
}  # fmt: skip
NAMES = {"reference": "eager", "foreach": "torch._foreach_*", "compile": "torch.compile"}
BASELINES = ("reference", "foreach", "compile")


def draw(rows: list[Row], path: Path) -> None:
    """Left: share of the copy bandwidth of every contender. Right: speedup of the fused kernels over the baselines."""
    lists = list(dict.fromkeys((row["list"], row["dtype"]) for row in rows))
    figure, panels = plt.subplots(len(lists), 2, figsize=(14, 3.2 * len(lists)), squeeze=False, layout="constrained")
    for (list_name, dtype), (left, right) in zip(lists, panels, strict=True):
        chosen = [row for row in rows if row["list"] == list_name and row["dtype"] == dtype]
        chosen = [row for row in chosen if row["contender"] in COLOURS]
        moving = [row for row in chosen if row["bytes_per_element"]]
        shares = {name: values(moving, name, "of_copy") for name in COLOURS}
        bars(left, shares, {name: COLOURS[name] for name in COLOURS}, f"{list_name}, {dtype}: share of a copy's GB/s")
        left.axhline(1.0, color="black", linewidth=0.8)
        speedups, colours = {}, {}
        for fused in ("cpu", "cuda", "triton"):
            for baseline in BASELINES:
                label = f"{fused} over {NAMES[baseline]}"
                speedups[label] = values(chosen, fused, f"speedup_over_{baseline}")
                colours[label] = COLOURS[baseline]
        bars(right, speedups, colours, f"{list_name}, {dtype}: times as fast")
        right.set_yscale("log")
        right.axhline(1.0, color="black", linewidth=0.8)
    about = rows[0]["machine"]
    where = about["gpu"] if rows[0]["device"] == "cuda" else f"{about['processor']}, {rows[0]['threads']} threads"
    figure.suptitle(f"{where}, commit {about['commit']}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def values(rows: list[Row], contender: str, key: str) -> dict[str, float]:
    """`key` per op, of one contender."""
    return {row["op"]: row[key] for row in rows if row["contender"] == contender and key in row}


def bars(axes: Axes, series: dict[str, dict[str, float]], colours: dict[str, str], title: str) -> None:
    """Groups of bars, one group per op; series without values are left out."""
    series = {name: found for name, found in series.items() if found}
    ops = list(dict.fromkeys(op for found in series.values() for op in found))
    width = 0.8 / max(1, len(series))
    for i, (name, found) in enumerate(series.items()):
        places = [ops.index(op) + (i - (len(series) - 1) / 2) * width for op in found]
        hatch = "//" if name.startswith("triton over") else None  # else two backends would look the same
        axes.bar(places, list(found.values()), width, label=NAMES.get(name, name), color=colours[name], hatch=hatch)
    axes.set_xticks(range(len(ops)), [op.replace("_", "\n", 1) for op in ops], fontsize=7)
    axes.set_title(title, fontsize=9)
    if series:
        axes.legend(fontsize=7)


def scaling(rows: list[Row], path: Path, label: str) -> None:
    """The model of `bench.model`: seconds of a meta step against GPUs; below, what of it is exposed communication."""
    small = [row for row in rows if row["lambda"] == "small" and "refused" not in row]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(2, len(models), figsize=(4 * len(models), 7), squeeze=False, layout="constrained")
    for model, top, bottom in zip(models, *panels, strict=True):
        for mode, colour in (("ddp", "tab:blue"), ("fsdp2", "tab:orange")):
            chosen = [row for row in small if row["model"] == model and row["mode"] == mode]
            gpus = [row["gpus"] for row in chosen]
            if not chosen:
                top.plot([], [], color=colour, label=f"{mode}: does not fit into memory")
                continue
            top.plot(gpus, [row["base"]["seconds"] for row in chosen], ":", color=colour, label=f"{mode}, base step")
            for sync, style in {"ddp": {"final": "o-", "full": "s-."}, "fsdp2": {"final": "o-"}}[mode].items():
                steps = [row["meta"][sync]["theta stays"] for row in chosen]
                name = f"{mode}, {sync}" if mode == "ddp" else f"{mode}, final and full"
                top.plot(gpus, [s["seconds"] for s in steps], style, color=colour, label=name)
                bottom.plot(gpus, [s["communication_share"] for s in steps], style, color=colour)
        top.set_title(f"{model}: seconds per meta step")
        bottom.set_title("share of exposed communication")
        for axes in (top, bottom):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({row["gpus"] for row in rows}), sorted({row["gpus"] for row in rows}))
            axes.set_xlabel("GPUs")
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        bottom.yaxis.set_major_formatter(PercentFormatter(1.0))
        top.legend(fontsize=7)
    figure.suptitle(
        f"{label}. Alpha-beta model, H100 nodes of 8, small λ; the same tokens per GPU on any number of GPUs"
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


SYNC_COLOURS = {
    None: "tab:gray", "none": "tab:green", "final": "tab:blue", "full": "tab:orange",
    "none, then all_reduce": "tab:red",
}  # fmt: skip


def measured_scaling(rows: list[Row], path: Path, disturbed: bool) -> None:
    """What `bench.scaling` has measured, a row of panels per kind of lambda: time, bytes sent, what of it is hidden."""
    lambdas = list(dict.fromkeys(row["lambda"] for row in rows))
    figure, panels = plt.subplots(len(lambdas), 3, figsize=(16, 4 * len(lambdas)), squeeze=False, layout="constrained")
    for lam, (left, middle, right) in zip(lambdas, panels, strict=True):
        chosen = [row for row in rows if row["lambda"] == lam]
        together = [row for row in chosen if row["processes"] > 1]
        grouped(left, chosen, "median_s", f"{lam} λ: ms per step, 10 to 90 %", 1e3)
        grouped(middle, together, "bytes_on_wire", f"{lam} λ: MB that a rank sends in a step", 1e-6)
        grouped(right, together, "hidden_share", f"{lam} λ: share of the collectives' time that is hidden", 1.0)
        right.yaxis.set_major_formatter(PercentFormatter(1.0))
        right.set_ylim(0, 1)
    about, first = rows[0]["machine"], rows[0]
    where = (
        about["gpu"] if first["device"] == "cuda" else f"{about['processor']}, {first['cpus']} CPUs for all processes"
    )
    trial = ", --quick: a trial" if first["quick"] else ""
    over = ". ⚠ more processes than CPUs: not scaling" * any(row["oversubscribed"] for row in rows)
    others = ". Other programs ran: the times are disturbed" * disturbed
    figure.suptitle(f"{where}, commit {about['commit']}{trial}{over}{others}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def grouped(axes: Axes, rows: list[Row], key: str, title: str, factor: float) -> None:
    """Bars of the steps, in groups of processes and mode; a value of None is left out."""
    groups = list(dict.fromkeys((r["processes"], r["threads"], r["mode"], r["oversubscribed"]) for r in rows))
    for i, (sync, colour) in enumerate(SYNC_COLOURS.items()):
        found = [r for r in rows if r["sync"] == sync and r[key] is not None]
        places = [groups.index((r["processes"], r["threads"], r["mode"], r["oversubscribed"])) for r in found]
        values = [r[key] * factor for r in found]
        errors = [[v - r["p10_s"] * factor, r["p90_s"] * factor - v] for v, r in zip(values, found, strict=True)]
        yerr = list(zip(*errors, strict=True)) if key == "median_s" and errors else None
        label = "base step" if sync is None else f"meta, {sync}"
        axes.bar(
            [p + (i - 2) * 0.16 for p in places], values, 0.16, yerr=yerr, color=colour, label=label, ecolor="black"
        )
    names = [f"{n}×{t} thr{' ⚠' * over}\n{mode}" for n, t, mode, over in groups]
    axes.set_xticks(range(len(groups)), names, fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, loc="upper left")


def algorithms(rows: list[Row], path: Path) -> None:
    """Throughput against memory, both as multiples of plain finetuning (paper, Figure 1); a panel per unroll length."""
    figures = [row for row in rows if row["record"] == "algorithm"]
    unrolls = list(dict.fromkeys(row["unroll"] for row in figures))
    names = list(dict.fromkeys(row["name"] for row in figures))
    markers = dict(zip(dict.fromkeys(row["source"] for row in figures), "*osDv^", strict=False))
    figure, panels = plt.subplots(1, len(unrolls), figsize=(6.5 * len(unrolls), 5), squeeze=False, layout="constrained")
    for unroll, axes in zip(unrolls, panels[0], strict=True):
        for row in (row for row in figures if row["unroll"] == unroll):
            median, low, high = row["throughput_of_plain"]
            axes.errorbar(
                row["memory_of_plain"], median, [[median - low], [high - median]], fmt=markers[row["source"]],
                color=f"C{names.index(row['name']) % 10}", label=f"{row['name']} ({row['source']})",
            )  # fmt: skip
        axes.set_title(f"{unroll} base steps per meta step" if unroll > 1 else "1 base step per meta step")
        axes.set_xlabel("peak memory, × finetuning")
        axes.set_ylabel("throughput, × finetuning (median, p10 to p90)")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=6)
    finish(figure, rows[0], path)


def memory_ladder(rows: list[Row], path: Path) -> None:
    """Peak memory against the number of parameters."""
    figures = [row for row in rows if row["record"] == "ladder"]
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for name in dict.fromkeys(row["name"] for row in figures):
        chosen = [row for row in figures if row["name"] == name]
        gigabytes = [row["live_bytes"] / 1e9 for row in chosen]
        axes.plot([row["parameters"] / 1e6 for row in chosen], gigabytes, "o-", label=name)
    axes.set_xlabel("parameters, millions")
    axes.set_ylabel("peak memory, GB")
    axes.legend(fontsize=7)
    finish(figure, rows[0], path)


def finish(figure: Figure, about: Row, path: Path) -> None:
    """Say where it was measured, and save."""
    where = about["machine"]["gpu"] or f"{about['machine']['processor']}, {about['machine']['torch_threads']} threads"
    disturbed = ", disturbed" if about["disturbed"] else ""
    attention = f"{about['attention']} attention"
    figure.suptitle(f"{where}, commit {about['machine']['commit']}, {attention}{disturbed}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
