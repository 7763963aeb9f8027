"""`python -m bench.algorithms`: all algorithms of `meta_grad(algorithm=...)` and public implementations of the same.

Throughput, peak memory and the time of a meta step against plain finetuning, on a BERT whose samples are reweighted by
a Meta-Weight-Net; every candidate on the same model and batches, interleaved. A period is `unroll` base steps and one
meta step. Iterative differentiation goes through `unroll` steps, which are the base steps too. Attention is unfused
("eager"), since fused attention has no second derivative: SAMA and plain finetuning would be faster without, see
`bench.meta_step`.

With --ladder: memory alone, against the number of parameters of RoBERTa-shaped models (paper, Figure 1).
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import algorithm_table, peers, plots
from bench.algorithm_cases import ATTENTION, OURS, Case, Task, compare, ours
from bench.measure import BUSY, disturbed, machine
from bench.memory_ladder import ladder
from bench.meta_step import SIZES
from bench.timing import CpuClock, CudaClock, Times, interleaved, spread
from sama_experiments.common.memory import CPU_MEASURE, CUDA_MEASURE, peak_bytes

Row = dict[str, Any]
UNROLLS = (10, 1)
PLAIN, WEIGHTED = "plain finetuning", "weighted base step"
SAME = 1e-3  # relative distance of meta gradients in float32, for the same function; seen: at most 5e-5


def agreements(terms: int, unrolls: Sequence[int], device: torch.device) -> list[Row]:
    """Each peer's meta gradient beside ours, where both are functions of the same numbers: on a toy BERT."""
    task = Task("toy", 8, 16, device, ATTENTION)
    task.without_randomness()
    restore = restorer(task)
    rows = []
    for case in peers.cases(task, terms, unrolls)[0]:
        assert case.peer_of is not None
        found = case.meta()
        restore()
        cosine, distance = compare(found, case.peer_of())
        row = {"record": "agreement", "key": case.key, "name": case.name, "source": case.source, "steps": case.steps}
        row |= {"cosine": cosine, "distance": distance, "same": distance < SAME, "differs": case.differs}
        print(algorithm_table.agreement(row), flush=True)
        rows.append(row)
    return rows


def restorer(task: Task) -> Callable[[], None]:
    """What puts theta back to where it is now: Betty leaves it elsewhere, base steps move it."""
    theta = [p.detach().clone() for p in task.net.parameters()]

    def restore() -> None:
        for p, value in zip(task.net.parameters(), theta, strict=True):
            p.data.copy_(value)

    return restore


def live_bytes(task: Task, cases: Sequence[Case], device: torch.device) -> dict[str, int]:
    """Most bytes alive in each step, the parameters, gradients and optimizer state with it; every case runs once."""
    fixed = [
        *task.net.parameters(),
        *task.net.buffers(),
        *(t for s in task.optimizer.state.values() for t in s.values()),
    ]
    size = sum(t.numel() * t.element_size() for t in fixed)
    found = {}
    for name, step in ((PLAIN, task.plain_step), (WEIGHTED, task.weighted_step)):
        task.optimizer.zero_grad()
        found[name] = size + peak_bytes(step, device)[0]
    grads = sum(p.grad.numel() * p.grad.element_size() for p in task.net.parameters() if p.grad is not None)
    restore = restorer(task)
    for case in cases:
        found[case.key] = size + grads + peak_bytes(case.meta, device)[0]
        restore()
    return found


def seconds(
    task: Task, cases: Sequence[Case], rounds: int, limit: float, device: torch.device
) -> dict[str, list[float]]:
    """Of every round; the peak memory was measured before, so that all is warm."""
    clock = CpuClock() if device.type == "cpu" else CudaClock(device)
    restore = restorer(task)
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        PLAIN: (restore, task.plain_step),
        WEIGHTED: (restore, task.weighted_step),
        **{case.key: (restore, case.meta) for case in cases},
    }
    times: dict[str, Times] = interleaved(clock, calls, rounds, limit, at_least=2)
    return {key: found.work for key, found in times.items()}


def period(case: Case | None, unroll: int, times: dict[str, list[float]]) -> list[float]:
    """Seconds of `unroll` base steps and a meta step, round by round; of plain steps where there is no case."""
    if case is None:
        return [unroll * s for s in times[PLAIN]]
    base = 0 if case.keeps_steps else unroll
    return [base * b + m for b, m in zip(times[WEIGHTED], times[case.key], strict=False)]


def rows_of(
    cases: Sequence[Case], unrolls: Sequence[int], batch: int, times: dict[str, list[float]], live: dict[str, int]
) -> list[Row]:
    """A row per unroll length and case."""
    rows = []
    for unroll in unrolls:
        plain = period(None, unroll, times)
        chosen: list[Case | None] = [None, *(c for c in cases if c.steps in (None, unroll))]
        for case in chosen:
            mine = period(case, unroll, times)
            key = PLAIN if case is None else case.key
            peak = live[PLAIN] if case is None else max(live[key], 0 if case.keeps_steps else live[WEIGHTED])
            rows.append(
                {
                    "record": "algorithm",
                    "unroll": unroll,
                    "name": PLAIN if case is None else case.name,
                    "source": "torch" if case is None else case.source,
                    "settings": "" if case is None else case.settings,
                    "base_steps_apart": case is None or not case.keeps_steps,
                    "rounds": len(mine),
                    "meta_step_s": None if case is None else spread(times[key]),
                    "samples_per_s": spread([unroll * batch / s for s in mine]),
                    "throughput_of_plain": spread([p / s for p, s in zip(plain, mine, strict=False)]),
                    "live_bytes": peak,
                    "memory_of_plain": peak / live[PLAIN],
                }
            )
    return rows


def run(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """The records of a run: about it, the peers' agreement, the figures."""
    about = header(options, device)
    task = Task(options.model, options.batch, options.tokens, device, ATTENTION)
    for _ in range(3):  # Adam's D is 0 before its second step
        task.weighted_step()
    others, missing = peers.cases(task, options.terms, UNROLLS)
    for line in missing:
        print(line, flush=True)
    agreed = agreements(options.terms, UNROLLS, device)
    cases = [*ours(task, options.terms, UNROLLS), *others]
    live = live_bytes(task, cases, device)
    times = seconds(task, cases, options.rounds, options.seconds, device)
    about |= {"missing_peers": missing, "load_after": os.getloadavg()[0]}
    about["disturbed"] |= about["load_after"] > torch.get_num_threads() + BUSY * about["machine"]["cpus"]
    return [about, *agreed, *rows_of(cases, UNROLLS, options.batch, times, live)]


def header(options: argparse.Namespace, device: torch.device) -> Row:
    """What was run, where; `disturbed` if others have been using the machine."""
    about = machine()
    settings = {key: getattr(options, key) for key in ("model", "batch", "tokens", "terms", "rounds", "quick")}
    return {
        "record": "run",
        "settings": settings,
        "attention": ATTENTION,
        "memory_measure": CUDA_MEASURE if device.type == "cuda" else CPU_MEASURE,
        "disturbed": disturbed(about),
        "machine": about,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, write JSON lines, the tables and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=SIZES, help="small takes minutes a round on 2 busy cores")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--terms", type=int, default=5, help="products with the Hessian of those that make any")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60, help="no round begins later, once there are two")
    parser.add_argument("--ladder", action="store_true", help="memory against the size of the model, nothing else")
    parser.add_argument("--quick", action="store_true", help="sizes that take seconds, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder for algorithms_<model>_<batch>x<tokens>_<device>.*, ladder_*")
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.batch, options.tokens, options.terms, options.rounds = "toy", 2, 4, 2, 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for theirs in ("We've integrated functorch", "The .grad attribute of a Tensor that is not a leaf"):  # of peers
        warnings.filterwarnings("ignore", message=theirs)
    if options.ladder:
        rows = [header(options, device), *ladder(options.terms, options.batch, options.tokens, options.quick, device)]
        text, draw, name = algorithm_table.ladder(rows), plots.memory_ladder, f"ladder_{device.type}"
    else:
        rows = run(options, device)
        text, draw = algorithm_table.markdown(rows), plots.algorithms
        name = f"algorithms_{options.model}_{options.batch}x{options.tokens}_{device.type}"
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (options.out / f"{name}.md").write_text(text + "\n")
        draw(rows, options.out / f"{name}.png")
    return 0


__all__ = ["OURS", "main", "period", "rows_of"]

if __name__ == "__main__":
    raise SystemExit(main())
