"""Time of every op against plain PyTorch, as GB/s of stated traffic: `python -m bench.kernels [--quick]`.

How it measures. Contenders take turns (one call each per round), so that a slow spell of the machine hits all of them.
Before each call the caches are flushed, and inputs that would drift (v <- D d repeated would end in denormals) are
reset. Before anything is timed, every contender's result is compared with the reference's; a wrong one is not timed,
and the program ends with exit status 1. Given are the median over the rounds and the 10th and 90th percentile. GB/s is
the traffic that the op cannot avoid (bytes read + written per element, as its docstring states) over the time, also for
contenders that move more. `of copy` relates it to `Tensor.copy_` of 1e8 float32 in the same rounds, on memory that has
been touched before. On a CPU ops in place can reach more than 100 %, because a copy also has to read the lines that it
overwrites. On a GPU the time is that between two events; `host` is the time until the call has returned.

Contenders: `cpu`, `cuda`, `triton`, the kernels of this library, as far as they run on the device; `reference`, plain
PyTorch tensor by tensor; `foreach`, see bench/contenders.py; `compile`, torch.compile(fullgraph=True) of the reference.
What torch.compile needs for compiling is not part of its times, but recorded. `adapt_norm_rmsprop` and
`adapt_norm_nadam` are adapt_norm_moments in the form RATIO, without and with first moments, `adapt_norm_adadelta` in
the form DELTA. `element_wise_part` is adapt_norm_adam, step_size, both perturbations and restore in one go. `adam_step`
is torch's own fused Adam step, as a yardstick. `adapt_norm_adam8bit` is adapt_norm_low_bit_adam with a scale for every
256 elements, which are not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import timing
from bench.cases import TOLERANCE, Expected, Op, fault, op_list
from bench.contenders import Contender, Foreach, Library, fused_adam
from bench.inputs import PRECISIONS, Inputs, memory_available, memory_needed
from bench.measure import machine
from bench.shapes import LISTS, Shapes, elements, scaled
from sama_kernels import backends

FUSED = ("cpu", "cuda", "triton")
ADAMS = ("adapt_norm_adam", "adapt_norm_adam8bit")
STATEFUL = (*ADAMS, "adapt_norm_rmsprop", "adapt_norm_nadam", "adapt_norm_adadelta", "element_wise_part")
COPY_ELEMENTS = 100_000_000
Calls = dict[str, tuple[timing.Call, timing.Call]]  # what to do before a call, the call


class Bench:
    """One run of the benchmark: its options, the clock, the copy that everything is related to, and the output."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.quick = options.scale < 1
        flush = (32 << 20) if self.quick else None
        self.clock: timing.Clock = (
            timing.CudaClock(self.device, flush) if self.device.type == "cuda" else timing.CpuClock(flush)
        )
        self.source = torch.randn(max(1, int(COPY_ELEMENTS * options.scale)), device=self.device)
        self.target = self.source.clone()
        self.about = machine()
        self.end = time.monotonic() + options.stop_after
        self.wrong = False
        self.file: Path | None = None
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            self.file = options.out / f"kernels_{self.device.type}.jsonl"
            if not options.more:
                self.file.write_text("")

    def write(self, **row: Any) -> None:
        """A JSON line: a measurement, or why there is none."""
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps({"device": self.device.type, **row, "machine": self.about}) + "\n")

    def note(self, text: str, **row: Any) -> None:
        """Say why something is not measured, on the terminal and in the file."""
        tqdm.write(text, file=sys.stderr)
        self.write(note=text, **row)

    def fused_backends(self) -> list[str]:
        """Those that run on the device; says why the others do not, if they are made for it."""
        found = []
        for name in FUSED:
            why = backends.unavailable(name, self.device)
            if why is None:
                found.append(name)
            elif (name == "cpu") == (self.device.type == "cpu"):
                self.note(f"{name} backend unavailable: {why}", backend=name)
        return found

    def run(self) -> None:
        """All lists and dtypes."""
        fused = self.fused_backends()
        plan = [(name, dtype) for name in self.options.lists for dtype in self.options.dtypes or self.usual(name)]
        progress = tqdm(plan, file=sys.stderr, unit="list", disable=None)
        for list_name, dtype in progress:
            progress.set_postfix_str(f"{list_name} {dtype}")
            torch._dynamo.reset()
            shapes = scaled(LISTS[list_name], self.options.scale) if self.quick else LISTS[list_name]
            key = {"list": list_name, "dtype": dtype, "tensors": len(shapes), "elements": elements(shapes)}
            needed, there = memory_needed(shapes, PRECISIONS[dtype]), memory_available(self.device)
            if time.monotonic() > self.end:
                self.note(f"{list_name} {dtype}: not begun, --stop-after is over", **key)
            elif needed > there:
                lacking = f"needs about {needed / 1e9:.1f} GB of memory, {there / 1e9:.1f} GB are available"
                self.note(f"{list_name} {dtype}: skipped, {lacking}", **key)
            else:
                self.measure_list(shapes, fused, key, progress)

    def usual(self, list_name: str) -> list[str]:
        """dtypes that are measured if --dtypes is not given: on a CPU the less, as the reference takes seconds."""
        if self.device.type == "cuda":
            return ["fp32", "bf16-fp32state", "bf16"]
        return ["fp32", "bf16-fp32state"] if list_name == "bert-base" else ["fp32"]

    def measure_list(self, shapes: Shapes, fused: list[str], key: dict[str, Any], progress: Any) -> None:
        """All ops for one list and dtype."""
        precision = PRECISIONS[key["dtype"]]
        inputs = Inputs(shapes, precision, self.device)
        contenders = self.contenders(inputs, fused, key)
        copies: Calls = {
            "copy": (lambda: None, lambda: self.target.copy_(self.source)),
            "list copy": (lambda: None, lambda: torch._foreach_copy_(contenders["foreach"].params, inputs.theta)),
        }
        for _, copy in copies.values():
            copy()  # the contenders are warmed up by the check
        for op in op_list(precision):
            if self.left_out(op, key):
                continue
            if time.monotonic() > self.end:
                self.note(f"{key['list']} {key['dtype']} {op.name}: not begun, --stop-after is over", op=op.name, **key)
                continue
            progress.set_postfix_str(f"{key['list']} {key['dtype']} {op.name}")
            racing = {n: c for n, c in contenders.items() if not op.only_library or n in fused}
            right, compile_s = self.checked(op, racing, contenders["reference"], key)
            calls = {name: (partial(op.reset, c), partial(op.call, c)) for name, c in right.items()}
            self.time_op(op.name, op.bytes_per_element, {**copies, **calls}, key, {"compile": compile_s})
        if precision.values == precision.state and "adam_step" in self.options.ops:
            adam: Calls = {"torch fused": (lambda: None, fused_adam(inputs))}
            self.time_op("adam_step", 7 * precision.values.itemsize, {**copies, **adam}, key, {})

    def contenders(self, inputs: Inputs, fused: list[str], key: dict[str, Any]) -> dict[str, Contender]:
        lists = ([torch.empty_like(x) for x in inputs.theta], [torch.empty_like(x) for x in inputs.theta])
        found: dict[str, Contender] = {name: Library(inputs, name, lists) for name in (*fused, "reference")}
        found["foreach"] = Foreach(inputs)
        if self.options.compile == "all" or self.options.compile == key["dtype"]:
            if key["tensors"] <= self.options.compile_at_most:
                found["compile"] = Library(inputs, "reference", lists, compiled=True)
            else:
                self.note(
                    f"{key['list']}: torch.compile is left out, {key['tensors']} tensors would take too long", **key
                )
        return found

    def left_out(self, op: Op, key: dict[str, Any]) -> bool:
        """By --ops; and what does not touch the optimizer state is measured once per dtype of the parameters."""
        stateful = op.name in STATEFUL
        twin = key["dtype"] == "bf16" and "bf16-fp32state" in (self.options.dtypes or self.usual(key["list"]))
        return not any(op.name.startswith(name) for name in self.options.ops) or (twin and not stateful)

    def checked(
        self, op: Op, contenders: dict[str, Contender], reference: Contender, key: dict[str, Any]
    ) -> tuple[dict[str, Contender], float]:
        """The contenders with the right result, in the state to be timed, and how long torch.compile took."""
        assert isinstance(reference, Library)
        expected = Expected.of(op, reference)
        right, compile_s = {}, 0.0
        for name, contender in contenders.items():
            start = time.perf_counter()
            tolerance = TOLERANCE[PRECISIONS[key["dtype"]].values]
            why_not = fault(op, contender, expected, tolerance) if contender is not reference else None
            if name == "compile":
                compile_s = time.perf_counter() - start
            if why_not is None:
                right[name] = contender
            else:
                self.wrong = True
                text = f"{key['list']} {key['dtype']} {op.name}: {name} is not timed: {why_not}"
                self.note(text, op=op.name, contender=name, refused=why_not, **key)
        for contender in right.values():
            op.begin(contender)
        return right, compile_s

    def time_op(
        self, op: str, bytes_per_element: int, calls: Calls, key: dict[str, Any], compile_s: dict[str, float]
    ) -> None:
        """Time all contenders of one op, and write a row for each."""
        times = timing.interleaved(self.clock, calls, self.options.rounds, self.options.seconds, self.options.at_least)
        medians = {name: timing.spread(t.work)[0] for name, t in times.items()}
        copy_rate = 2 * self.source.nbytes / medians["copy"]
        list_bytes = 2 * key["elements"] * PRECISIONS[key["dtype"]].values.itemsize
        for name, t in times.items():
            median, low, high = timing.spread(t.work)
            yardstick = {"copy": copy_rate, "list copy": list_bytes / median}.get(name)
            rate = bytes_per_element * key["elements"] / median if yardstick is None else yardstick
            baselines = [] if yardstick else [n for n in ("reference", "foreach", "compile") if n in times]
            row = {
                **key, "threads": torch.get_num_threads(), "scale": self.options.scale, "op": op, "contender": name,
                "bytes_per_element": bytes_per_element, "median_s": median, "p10_s": low, "p90_s": high,
                "host_s": timing.spread(t.host)[0], "rounds": len(t.work), "gb_per_s": rate / 1e9,
                "of_copy": rate / copy_rate, "of_list_copy": rate * medians["list copy"] / list_bytes,
                **{f"speedup_over_{n}": medians[n] / median for n in baselines},
                **({"compile_s": compile_s[name]} if name in compile_s else {}),
            }  # fmt: skip
            self.write(**row)
            tqdm.write(table_line(row), file=sys.stdout)


def table_line(row: dict[str, Any]) -> str:
    spread = f"{row['p10_s'] * 1e3:.3f}..{row['p90_s'] * 1e3:.3f}"
    speedup = f"{row['speedup_over_reference']:8.1f}x" if "speedup_over_reference" in row else ""
    start = f"{row['list']:10}{row['dtype']:15}{row['threads']:3} {row['op']:24}{row['contender']:12}"
    return (
        f"{start}{row['median_s'] * 1e3:11.3f} {spread:>21}{row['host_s'] * 1e3:10.3f}"
        f"{row['gb_per_s']:9.1f}{row['of_copy']:8.0%}{speedup}"
    )


HEADER = (
    f"{'list':10}{'dtype':15}{'thr':>3} {'op':24}{'contender':12}{'ms':>11} {'10..90 %':>21}{'host ms':>10}"
    f"{'GB/s':>9}{'of copy':>8}{'speedup':>9}"
)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    names = [*dict.fromkeys(op.name for p in PRECISIONS.values() for op in op_list(p)), "adam_step"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if gpu else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=["flat", "bert-base", "tiny"])
    parser.add_argument("--dtypes", nargs="+", choices=PRECISIONS, help="default: on a GPU the first three; on a CPU"
                        " fp32, for bert-base the second too")  # fmt: skip
    parser.add_argument("--ops", nargs="+", metavar="OP", default=names, help="names or their beginnings")
    parser.add_argument("--compile", choices=["all", "none", *PRECISIONS],
                        help="dtypes for which torch.compile takes part (takes minutes); default: fp32")  # fmt: skip
    parser.add_argument(
        "--compile-at-most", type=int, default=200, metavar="TENSORS",
        help="longer lists are not compiled: the reference's code is unrolled over the list",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--at-least", type=int, default=5, help="rounds, whatever --seconds says")
    parser.add_argument("--seconds", type=float, default=2.5, help="per op: no new round after this time")
    parser.add_argument(
        "--stop-after", type=float, default=float("inf"), metavar="SECONDS", help="no new op after this"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of the tensors' sizes, to try things out")
    parser.add_argument(
        "--quick", action="store_true", help="3 rounds, 1/100 of the size, no torch.compile: that it runs"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write FOLDER/kernels_<device>.jsonl (a new file)")
    parser.add_argument("--more", action="store_true", help="add to that file")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.at_least, options.scale = 3, 3, min(options.scale, 0.01)
    options.compile = options.compile or ("none" if options.quick else "fp32")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 1 if a contender was refused for a wrong result."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # contenders.Library compiles all ops by way of one function
    bench = Bench(options)
    print(json.dumps(bench.about), file=sys.stderr)
    print(HEADER)
    with torch.no_grad():
        bench.run()
    return int(bench.wrong)


if __name__ == "__main__":
    raise SystemExit(main())
