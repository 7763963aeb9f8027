"""Time of every op against plain PyTorch, as GB/s of stated traffic: `python -m bench.kernels [--quick]`.

How it measures. Contenders take turns (one call each per round), so that a slow spell of the machine hits all of them.
Before each call its inputs are reset (v <- D d repeated would end in denormals) and a buffer larger than the private
caches is written. Given are the median over the rounds and the spread between the 10th and the 90th percentile. GB/s
is the traffic that the op cannot avoid (bytes read + written per element, as its docstring states) over the time, also
for contenders that move more. `of copy` relates it to `Tensor.copy_` of a large buffer in the same rounds; ops in place
reach more than 100 %, because a copy also has to read the lines that it overwrites. `step_size` is left out: it works
on a handful of numbers.

Contenders: `cpu`, the compiled kernels; `reference`, plain PyTorch tensor by tensor; `foreach`, the same result by
`torch._foreach_*` with scalars known on the host (perturb and restore keep a copy of theta: an extra buffer of the
model's size, which the op does without); `compile`, torch.compile of the reference (the one-tensor list only: it
takes minutes for hundreds of tensors). `adam_step` is torch's own fused Adam step on the same list, as a yardstick.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import machine
from sama_kernels import backends, ops
from sama_kernels.backends import reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
ADAM = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "maximize": False, "mode": 0}
STEP = 100.0
EPSILON = 0.01
Shapes = list[tuple[int, ...]]
Contender = tuple[Callable[[], object], Callable[[], object]]  # what to reset before a call, the call


def encoder(vocabulary: int, width: int, layers: int) -> Shapes:
    """The parameters of a BERT encoder with a pooler, in their order."""
    shapes: Shapes = [(vocabulary, width), (512, width), (2, width), (width,), (width,)]
    for _ in range(layers):
        shapes += [(width, width), (width,)] * 4 + [(width,)] * 2
        shapes += [(4 * width, width), (4 * width,), (width, 4 * width), (width,), (width,), (width,)]
    return [*shapes, (width, width), (width,)]


LISTS: dict[str, Shapes] = {
    "bert-base": encoder(30522, 768, 12),
    "minilm": encoder(30522, 384, 6),
    "flat": [(22_713_216,)],
    "tiny": [(8,)] * 2000,
}


class Case:
    """The tensors of one list and dtype, and for each op its contenders and its traffic in operands per element."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, compiled: bool):
        def randn(scale: float = 1.0) -> list[Tensor]:
            return [(scale * torch.randn(shape)).to(dtype) for shape in shapes]

        self.v, self.saved, self.params, self.theta, self.grads = randn(), randn(), randn(), randn(), randn(0.01)
        self.m = randn(0.01)
        self.w = [(x.float().square() + 1e-6).to(dtype) for x in randn(0.01)]
        self.steps = [torch.tensor(STEP)] * len(shapes)
        self.epsilon = torch.tensor(EPSILON, dtype=torch.float64)
        self.numel = sum(x.numel() for x in self.v)
        self.itemsize = dtype.itemsize
        self.backends = [b for b in ("cpu", "reference") if backends.unavailable(b, torch.device("cpu")) is None]
        self.compiled = compiled

    def reset(self, *pairs: tuple[list[Tensor], list[Tensor]]) -> Callable[[], object]:
        def run() -> None:
            for destination, source in pairs:
                torch._foreach_copy_(destination, source)

        return run

    def ops(self) -> dict[str, tuple[int, dict[str, Contender]]]:
        """Name -> (operands read and written per element, contenders)."""
        reset_v, reset_both = (
            self.reset((self.v, self.saved)),
            self.reset((self.v, self.saved), (self.params, self.theta)),
        )
        state = (self.grads, self.m, self.w, [], [], self.steps)

        def contenders(
            reset: Callable[[], object], run: Callable[[str], object], foreach: Callable[[], object], plain: str = ""
        ) -> dict[str, Contender]:
            found: dict[str, Contender] = {b: (reset, lambda b=b: run(b)) for b in self.backends}  # type: ignore[misc]
            found["foreach"] = (reset, foreach)
            if self.compiled and plain:
                function = getattr(reference, plain)
                compiled = torch.compile(function, dynamic=False)
                found["compile"] = (reset, lambda: compiled(*self.arguments(plain)))
            return found

        return {
            "adapt_norm_adam": (5, contenders(
                reset_v, lambda b: ops.adapt_norm_adam(self.v, *state, **ADAM, backend=b), self.foreach_adam,
                "adapt_norm_adam")),
            "adapt_norm_scale": (2, contenders(
                reset_v, lambda b: ops.adapt_norm_scale(self.v, 0.3, backend=b), self.foreach_scale,
                "adapt_norm_scale")),
            "perturb": (4, contenders(
                reset_both, lambda b: ops.perturb(self.params, self.v, self.epsilon, ops.PLUS, backend=b),
                self.foreach_perturb, "perturb")),
            "restore": (3, contenders(
                reset_both, lambda b: ops.restore(self.params, self.v, backend=b),
                lambda: torch._foreach_copy_(self.params, self.theta), "restore")),
            "central_difference": (3, contenders(
                reset_v, lambda b: ops.central_difference(self.v, self.m, [], self.epsilon, self.epsilon, backend=b),
                self.foreach_difference, "central_difference")),
        }  # fmt: skip

    def arguments(self, op: str) -> tuple[Any, ...]:
        """The positional arguments of the reference kernels."""
        scalars = [ADAM[name] for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize", "mode")]
        return {
            "adapt_norm_adam": (self.v, self.grads, self.m, self.w, [], [], self.steps, None, *scalars),
            "adapt_norm_scale": (self.v, None, 0.3),
            "perturb": (self.params, self.v, self.epsilon, ops.PLUS),
            "restore": (self.params, self.v),
            "central_difference": (self.v, self.m, [], self.epsilon, self.epsilon),
        }[op]

    def foreach_adam(self) -> Tensor:
        """D = lr/c1 ((1-b1) s - (1-b2) m g / (c2 s)) / q^2 by torch._foreach_*; 0/0 where w = 0 is not dealt with."""
        lr, b1, b2, eps = (ADAM[name] for name in ("lr", "beta1", "beta2", "eps"))
        c1, c2 = 1 - b1**STEP, 1 - b2**STEP
        s = torch._foreach_sqrt(self.w)
        torch._foreach_mul_(s, c2**-0.5)
        second = torch._foreach_mul(self.m, self.grads)
        torch._foreach_div_(second, s)
        torch._foreach_mul_(second, (1 - b2) / c2)
        q = torch._foreach_add(s, eps)
        torch._foreach_mul_(q, q)
        torch._foreach_mul_(s, 1 - b1)
        torch._foreach_sub_(s, second)
        torch._foreach_div_(s, q)
        torch._foreach_mul_(s, lr / c1)
        torch._foreach_mul_(self.v, s)
        return torch.stack(torch._foreach_norm(self.v)).double().square().sum()

    def foreach_scale(self) -> Tensor:
        torch._foreach_mul_(self.v, 0.3)
        return torch.stack(torch._foreach_norm(self.v)).double().square().sum()

    def foreach_perturb(self) -> None:
        torch._foreach_copy_(self.saved, self.params)
        torch._foreach_add_(self.params, self.v, alpha=EPSILON)

    def foreach_difference(self) -> None:
        torch._foreach_sub_(self.v, self.m)
        torch._foreach_mul_(self.v, -0.5 / EPSILON)

    def fused_adam(self) -> Contender:
        copies = [p.clone().requires_grad_() for p in self.params]
        for p, g in zip(copies, self.grads, strict=True):
            p.grad = g
        optimizer = torch.optim.Adam(copies, fused=True)
        return (lambda: None), optimizer.step


def measure(contenders: dict[str, Contender], rounds: int, flush: Tensor) -> dict[str, list[float]]:
    """Seconds per call, contenders taking turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(-1, rounds):  # the first round warms up
        for name, (reset, call) in contenders.items():
            reset()
            flush.add_(1)
            start = time.perf_counter()
            call()
            if round_number >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 rounds, fp32, without bert-base and torch.compile")
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=list(LISTS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="append JSON lines to FOLDER/kernels.jsonl")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.dtypes = 5, ["fp32"]
        options.lists = [name for name in options.lists if name != "bert-base"]
    flush, large, target = torch.zeros(8 << 20), torch.randn(22_713_216), torch.empty(22_713_216)
    copy: Contender = ((lambda: None), lambda: target.copy_(large))
    about = machine()
    print(json.dumps(about), file=sys.stderr)
    print(f"{'list':10}{'dtype':6}{'threads':>8} {'op':20}{'contender':11}{'ms':>9} {'10..90 %':>17}"
          f"{'GB/s':>7}{'of copy':>9}{'speedup':>9}")  # fmt: skip
    for list_name in options.lists:
        for dtype in options.dtypes:
            case = Case(LISTS[list_name], DTYPES[dtype], compiled=list_name == "flat" and not options.quick)
            table = case.ops()
            table["adam_step"] = (7, {"torch fused": case.fused_adam()})
            for threads in options.threads:
                torch.set_num_threads(threads)
                for op, (operands, contenders) in table.items():
                    times = measure({"copy": copy, **contenders}, options.rounds, flush)
                    report(options.out, about, list_name, dtype, threads, op, operands * case.itemsize, case, times)


def report(
    out: Path | None, about: dict[str, Any], list_name: str, dtype: str, threads: int, op: str, bytes_per_element: int,
    case: Case, times: dict[str, list[float]],
) -> None:  # fmt: skip
    copy = 8 * 22_713_216 / statistics.median(times.pop("copy"))
    base = statistics.median(times["reference"]) if "reference" in times else None
    for contender, seconds in times.items():
        median, (low, *_, high) = statistics.median(seconds), statistics.quantiles(seconds, n=10)
        rate = bytes_per_element * case.numel / median
        row = {
            "list": list_name, "tensors": len(case.v), "elements": case.numel, "dtype": dtype, "threads": threads,
            "op": op, "contender": contender, "bytes_per_element": bytes_per_element, "median_s": median,
            "p10_s": low, "p90_s": high, "rounds": len(seconds), "gb_per_s": rate / 1e9, "of_copy": rate / copy,
            "speedup_over_reference": base / median if base else None, "machine": about,
        }  # fmt: skip
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            with (out / "kernels.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        speedup = f"{base / median:8.1f}x" if base else ""
        spread = f"{low * 1e3:8.2f}..{high * 1e3:.2f}"
        print(f"{list_name:10}{dtype:6}{threads:8} {op:20}{contender:11}{median * 1e3:9.2f} {spread:>17}"
              f"{rate / 1e9:7.1f}{rate / copy:9.0%}{speedup}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
