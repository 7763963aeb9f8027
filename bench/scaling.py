"""Meta steps on several processes of this machine, measured: `python -m bench.scaling [--quick]`.

On 1, 2, 4 processes (gloo on the CPU, NCCL where there are GPUs, one process for each) a small BERT in
DistributedDataParallel and sharded by `fully_shard`; a small lambda (a Meta-Weight-Net, replicated) and a large one (a
factor on every weight of the encoder). Steps: the plain base step; a meta step with sync="none", "final", "full"; and
"none" followed by one all-reduce of the result, as one would write it without `sync`. They take turns, so that a slow
spell of the machine hits all of them, and begin together; a step takes as long as on its slowest rank. Median, 10th and
90th percentile over the rounds. Weak scaling, a fixed batch per process; with --strong a fixed global batch, as in the
paper's Table 2.

Every process gets CPUs / processes threads. So two processes on two CPUs have the hardware of one with two threads:
the one to compare with is that with one thread, which is measured too. Where there are more processes than CPUs, they
are oversubscribed, and their times say nothing about scaling; the records and tables say so.

Bytes are counted: of the tensors that the step really gives to collectives, those that DistributedDataParallel and FSDP
issue included (payload); what a rank sends of them by the ring formula, 2 (p - 1) / p of n bytes for an all-reduce,
half of that for a gather or a scatter (wire), except that gloo scatters by an all-reduce; and, with gloo on Linux, what
the kernel says that the process has written (written). `hidden` is the share of the time of the collectives in which
this rank computes, from a trace of torch.profiler, see `hidden_share_method`.

Writes scaling_<device>.jsonl, with records of kind "link" (an all-reduce between two processes) that `bench.model
--measured` takes, and draws scaling_<device>.png. `python -m bench.scaling_report` makes tables of it again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from bench import scaling_ranks, scaling_report
from bench.collectives import COUNTED, METHOD
from bench.measure import machine, paired_ratio
from bench.parallel_workload import LAMBDAS, MODES, Size
from bench.report import ReportError
from bench.scaling_ranks import Plan, Row
from bench.timing import spread

UNROLL = 10  # base steps per meta step (paper, Table 4)
LINK_BYTES = (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
QUICK_LINK_BYTES = (1 << 10, 1 << 18, 1 << 22)
WEAK_BATCH, STRONG_BATCH = 8, 48  # the latter is the paper's (Table 2)


def groups(processes: list[int], cpus: int, on_gpu: bool) -> list[tuple[int, int]]:
    """(processes, threads of each), and one process with as many threads as those of the others, to relate them to."""
    found = [(count, max(1, cpus // count)) for count in sorted(processes)]
    if on_gpu:
        return found
    alone = [(1, threads) for threads in dict.fromkeys(threads for _, threads in found)]
    return list(dict.fromkeys([*alone, *found]))


def combined(of_ranks: list[list[Row]], about: Row) -> list[Row]:
    """One record for what all ranks have measured: of seconds, bytes and memory the most, of communication the sums."""
    records = []
    for parts in zip(*of_ranks, strict=True):
        times = [max(each) for each in zip(*(part["seconds"] for part in parts), strict=True)]
        median, low, high = spread(times)
        common = {"kind": parts[0]["kind"], **about, "rounds": len(times)}
        if common["kind"] == "link":
            spread_of = {"seconds": median, "p10_s": low, "p90_s": high}
            records.append({**common, "bytes": parts[0]["bytes"], **spread_of})
            continue
        kept = ("mode", "lambda", "step", "sync", "collectives", "theta_elements", "lambda_elements")
        most = {key: max(part[key] for part in parts) for key in ("payload_bytes", "bytes_on_wire", "peak_memory")}
        written = [part["bytes_written"] for part in parts]
        busy, hidden = (sum(sum(part[key]) for part in parts) for key in ("collective_s", "hidden_s"))
        traces = len(parts) * len(parts[0]["hidden_s"])
        records.append({
            **common, **{key: parts[0][key] for key in kept}, **most,
            "bytes_written": None if None in written else sum(written) / len(written),
            "median_s": median, "p10_s": low, "p90_s": high, "times": times,
            "samples_per_s": about["samples"] / median, "collective_s": busy / traces,
            "hidden_share": hidden / busy if busy and about["processes"] > 1 else None,
        })  # fmt: skip
    return related(records)


def related(records: list[Row]) -> list[Row]:
    """Meta steps against the base step of their rounds, alone and in a training with UNROLL base steps for each."""
    bases = {(r["mode"], r["lambda"]): r["times"] for r in records if r.get("step") == "base"}
    for r in records:
        if r.get("step") == "meta":
            base = bases[r["mode"], r["lambda"]]
            r["over_base"] = paired_ratio(r["times"], base)
            training = spread([UNROLL * b + m for b, m in zip(base, r["times"], strict=True)])[0]
            r["training_samples_per_s"] = UNROLL * r["samples"] / training
        r.pop("times", None)
    return records


def parse(arguments: list[str] | None) -> argparse.Namespace:
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[n for n in (1, 2, 4) if n <= gpus or not gpus])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--lambdas", nargs="+", choices=LAMBDAS, default=list(LAMBDAS))
    parser.add_argument("--strong", action="store_true", help="a fixed global batch instead of one per process")
    parser.add_argument("--model", default="small", help="as of bench.meta_step; default: small")
    parser.add_argument("--batch", type=int, help=f"samples per process, default {WEAK_BATCH}; with --strong of all"
                        f" processes, default {STRONG_BATCH}")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--bucket-mib", type=float, default=2.5,
                        help="of gradients, also of DistributedDataParallel; default: 2.5, of which the small BERT has"
                        " as many as BERT-base has of 25")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--traces", type=int, default=2, help="steps under the profiler")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 2 processes, 3 rounds: that it runs")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), metavar="FOLDER")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables between"
                        f" {scaling_report.BEGIN} and {scaling_report.END} there")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.batch, options.tokens, options.bucket_mib = "tiny", 4, 8, 0.5
        options.rounds, options.traces = 3, 1
        options.processes = [min(2, max(options.processes))]
    options.batch = options.batch or (STRONG_BATCH if options.strong else WEAK_BATCH)
    if min(options.processes) < 1 or (gpus and max(options.processes) > gpus):
        parser.error(f"--processes: at least 1{f', at most the {gpus} GPUs' * bool(gpus)}; got {options.processes}")
    if options.strong and (odd := [n for n in options.processes if options.batch % n]):
        parser.error(f"--strong: {odd[0]} processes cannot divide a batch of {options.batch}")
    if options.rounds < 3:
        parser.error(f"--rounds: at least 3, got {options.rounds}")
    return options


def measured(options: argparse.Namespace, about: Row) -> Iterator[Row]:
    """All records, as they come."""
    on_gpu, cpus = torch.cuda.is_available(), os.cpu_count() or 1
    device = "cuda" if on_gpu else "cpu"
    todo = groups(options.processes, cpus, on_gpu)
    with tqdm(total=len(todo) * len(options.modes) * len(options.lambdas), file=sys.stderr, disable=None) as progress:
        for world, threads in todo:
            name = f"{world} process{'es' * (world > 1)}, {threads} thread{'s' * (threads > 1)}"
            progress.set_postfix_str(f"{name}: starting")

            def tell(text: str, name: str = name) -> None:
                progress.set_postfix_str(f"{name}: {text}")
                progress.update()

            batch = options.batch // world if options.strong else options.batch
            size = Size(options.model, batch, options.tokens, options.bucket_mib)
            link_bytes = (QUICK_LINK_BYTES if options.quick else LINK_BYTES) if world == 2 else ()
            over = not on_gpu and world * threads > cpus
            rounds, traces = (3, 1) if over else (options.rounds, options.traces)  # they take long, and say little
            plan = Plan(size, tuple(options.modes), tuple(options.lambdas), rounds, traces, link_bytes)
            group = {
                "processes": world, "threads": threads, "cpus": cpus, "device": device, "samples": batch * world,
                "oversubscribed": over, "strong": options.strong, **vars(size),
                "backend": "nccl" if on_gpu else "gloo", "quick": options.quick, "counted": COUNTED,
                "hidden_share_method": METHOD[device],
            }  # fmt: skip
            found = combined(scaling_ranks.run(world, threads, plan, tell), group)
            yield from ({**record, "machine": about} for record in found)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write JSON lines, print tables and the model's prediction, draw."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = options.out / f"scaling_{'strong_' * options.strong}{device}.jsonl"
    with path.open("w") as file:
        for record in measured(options, machine()):
            print(json.dumps(record), file=file, flush=True)
    try:
        scaling_report.report(path, plot=not options.no_plots, page=options.write)
    except ReportError as error:
        raise SystemExit(f"bench.scaling: {error}") from error
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
