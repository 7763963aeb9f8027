"""Time of a SAMA meta step on many GPUs by an alpha-beta model, on paper: not measured. `python -m bench.model`.

Nothing is run or measured: every figure follows from data sheets, published latencies, counted FLOPs and counted bytes.
What is modelled stands in bench/model_steps.py, the collectives and every number of the hardware with its source in
bench/alpha_beta.py, the comparison with published throughputs in bench/model_checks.py.

Models of BERT-base, 1B, 8B, 70B on nodes of 8 H100s; DDP and FSDP2; the same number of tokens per GPU on any number of
GPUs. Printed are the seconds of a plain base step and of a meta step for every `sync`, and of the meta step with
sync="final" its parts, and what one GPU sends. The share of the peak that the passes achieve is the only fitted number:
it is that of a published run on 8 H100s. What needs more memory than a GPU has is refused.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.alpha_beta import H100
from bench.model_checks import against_paper, against_torchtitan, compare_measured, h100_share
from bench.model_steps import BUCKET, LABEL, LAMBDAS, MODELS, MODES, SYNCS, Run, Step, base_step, meta_step
from bench.report import ReportError, write_between_markers

__all__ = ["compare_measured", "predictions", "tables"]

Row = dict[str, Any]
BEGIN, END = "<!-- bench:model -->", "<!-- /bench:model -->"
GPUS = (8, 64, 256, 1024)
HEADINGS = {
    "small": "λ of 1e5 elements (a reweighting net): passes 1, 2, 3 are 3 F, 1 F, 1 F",
    "large": "λ with an element per element of θ, in the layers: every pass is 3 F",
}


def predictions(gpus: tuple[int, ...] = GPUS, share: float | None = None, bucket: int = BUCKET) -> list[Row]:
    """A row per model, mode, number of GPUs and kind of lambda.

    Returns:
        Rows with `base`, and `meta`: sync -> update_base ("theta stays", "theta moves") -> the parts of a step in
        seconds and bytes per GPU; or with `refused`, why there is no number.
    """
    share = h100_share() if share is None else share
    return [
        row(Run(model, H100, count, mode, share, model.tokens, bucket), lam)
        for lam in LAMBDAS for model in MODELS for mode in MODES for count in gpus
    ]  # fmt: skip


def row(run: Run, lam: str) -> Row:
    """The steps of one run."""
    about: Row = {
        "label": LABEL, "model": run.model.name, "mode": run.mode, "gpus": run.gpus, "lambda": lam,
        "tokens_per_gpu": run.tokens, "share_of_peak": run.share, "state_bytes": run.state_bytes(lam),
    }  # fmt: skip
    if about["state_bytes"] > run.cluster.memory:
        needed, there = about["state_bytes"] / 1e9, run.cluster.memory / 1e9
        return {**about, "refused": f"needs {needed:,.0f} GB per GPU without activations, of {there:.0f} GB"}
    moves = {"theta stays": False, "theta moves": True}
    meta = {s: {name: parts(meta_step(run, s, lam, move)) for name, move in moves.items()} for s in SYNCS}
    return {**about, "base": parts(base_step(run)), "meta": meta}


def parts(step: Step) -> dict[str, float]:
    """Seconds and bytes of a step; the share of communication is that of exposed seconds."""
    share = step.exposed / step.seconds
    return {**vars(step), "seconds": step.seconds, "hidden": step.hidden, "communication_share": share}


def tables(rows: list[Row]) -> str:
    """The predictions in Markdown, a table per kind of lambda."""
    return "\n\n".join(f"{HEADINGS[lam]}.\n\n{table([r for r in rows if r['lambda'] == lam])}" for lam in LAMBDAS)


def table(rows: list[Row]) -> str:
    """What is refused on any number of GPUs gets one line."""
    names = [
        "model", "mode", "GPUs", "base step", "none", "final", "full", "compute", "element-wise",
        "exposed", "hidden", "of the step", "NVLink MB", "network MB",
    ]  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---|---|" + "---:|" * (len(names) - 2)]
    for r in rows:
        first = f"| {r['model']} | {'DDP' if r['mode'] == 'ddp' else 'FSDP2'} |"
        if "refused" in r:
            key = (r["model"], r["mode"], r["refused"])
            same = [x["gpus"] for x in rows if (x["model"], x["mode"], x.get("refused")) == key]
            if same[0] == r["gpus"]:
                counts = ", ".join(map(str, same))
                lines.append(f"{first} {counts} | {r['refused']} {'|' * (len(names) - 3)}")
            continue
        final = r["meta"]["final"]["theta stays"]
        steps = [r["base"], r["meta"]["none"]["theta stays"], final]
        times = [s["seconds"] for s in (*steps, r["meta"]["full"]["theta stays"])]
        times += [final[name] for name in ("compute", "element_wise", "exposed", "hidden")]
        cells = [*map(milliseconds, times), f"{final['communication_share']:.1%}"]
        cells += [f"{final[name] / 1e6:,.1f}" for name in ("inside", "between")]
        lines.append(f"{first} {r['gpus']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def checks_table(rows: list[Row]) -> str:
    """Reported and predicted throughputs, a line per point."""
    names = ["series", "on", "share of peak", "ms added to a step", "GPUs", "reported", "predicted", "error"]
    lines = [f"| {' | '.join(names)} |", "|---|---|" + "---:|" * (len(names) - 2)]
    for r in rows:
        fit = [f"{r['share_of_peak']:.3f}", milliseconds(r["seconds_per_step"])]
        error = "fitted" if r["fitted"] else f"{r['error']:+.1%}"
        cells = [r["series"], r["on"], *fit, r["gpus"], f"{r['reported']:,.1f}", f"{r['predicted']:,.1f}", error]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def measured_table(rows: list[Row]) -> str:
    """Measured steps and what the model says."""
    names = [
        "processes", "mode", "λ", "step", "measured", "predicted", "error", "lowest", "highest", "over one process",
    ]  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---:|---|---|---|" + "---:|" * (len(names) - 4)]
    for r in rows:
        times = [milliseconds(r[name]) for name in ("measured", "predicted")]
        bounds = [milliseconds(r[name]) for name in ("lowest", "highest")]
        step = "base step" if r["step"] == "base" else f"meta, {r['sync']}"
        about = [r["processes"], r["mode"], r["lambda"] or "", step]
        cells = [*about, *times, f"{r['error']:+.1%}", *bounds, f"{r['relative']:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def report(rows: list[Row], checks: list[Row]) -> str:
    """All that is printed of a model."""
    first = rows[0]
    tokens = ", ".join(f"{m.name} {m.tokens:,}" for m in MODELS)
    about = (
        f"**{LABEL}.** {H100.name}; {first['share_of_peak']:.3f} of {H100.peak / 1e12:.0f} TFLOP/s achieved; tokens per"
        f" GPU and pass: {tokens}. Times in ms; `none`, `final`, `full`: a meta step; the columns from `compute` on:"
        " of a meta step with `final`."
    )
    heading = f"Published throughputs (reported: measured by others; predicted: {LABEL})."
    return f"{about}\n\n{tables(rows)}\n\n{heading}\n\n{checks_table(checks)}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS), help="at most 8, or a multiple of 8")
    parser.add_argument("--share", type=float, help="of the peak FLOP/s; default: calibrated, see above")
    parser.add_argument("--bucket-mib", type=float, default=BUCKET / 2**20, help="gradient buckets of DDP; default: 25")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), metavar="FOLDER",
                        help="where model.json and model.png go; default: bench/results")  # fmt: skip
    parser.add_argument("--no-plots", action="store_true", help="no model.png")
    parser.add_argument("--write", type=Path, metavar="PAGE", help=f"put the tables between {BEGIN} and {END} there")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="compare with a file of bench.scaling, no more")
    options = parser.parse_args(arguments)
    if wrong := [count for count in options.gpus if count < 1 or (count > H100.node and count % H100.node)]:
        parser.error(f"--gpus: {wrong[0]} is neither between 1 and {H100.node}, nor a multiple of it")
    if options.share is not None and not 0 < options.share <= 1:
        parser.error(f"--share: must be above 0 and at most 1, got {options.share}")
    if options.bucket_mib * 2**20 < 4:
        parser.error(f"--bucket-mib: no element fits into {options.bucket_mib}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Predict, print, write JSON and a plot; or compare with measured steps."""
    options = parse(arguments)
    try:
        if options.measured:
            print(f"Predicted: {LABEL}. Times in ms.\n\n{measured_table(compare_measured(options.measured))}")
        else:
            predict(options)
    except (ReportError, OSError) as error:
        raise SystemExit(f"bench.model: {error}") from error
    return 0


def predict(options: argparse.Namespace) -> None:
    """Everything but the comparison with measured steps."""
    rows = predictions(tuple(options.gpus), options.share, int(options.bucket_mib * 2**20))
    checks = against_paper() + against_torchtitan()
    text = report(rows, checks)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    about = {"label": LABEL, "cluster": asdict(H100), "models": [vars(model) for model in MODELS]}
    result = {**about, "rows": rows, "published": checks}
    (options.out / "model.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if not options.no_plots:
        from bench import plots

        plots.scaling(rows, options.out / "model.png", LABEL)
    if options.write:
        write_between_markers(options.write, text, BEGIN, END)


if __name__ == "__main__":
    raise SystemExit(main())
