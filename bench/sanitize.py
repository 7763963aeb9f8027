"""Every op once on every backend and dtype, for a tool that watches memory: `compute-sanitizer ... -m bench.sanitize`.

Small tensors whose lengths leave heads and tails, and that begin where no vector load may; each operand at an offset of
its own. Results are compared with the reference backend on the CPU, so that a kernel that does nothing is noticed too.
Run it with PYTORCH_NO_CUDA_MEMORY_CACHING=1: then every tensor is an allocation of its own, and an access beyond its
end is one that the tool can see. Exit status 1: wrong results; 3: a backend made for this device cannot run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.cases import relative_distance
from bench.contenders import ALPHA, BETA1, BETA2, EPS, LR, TINY
from bench.inputs import PRECISIONS, Precision
from sama_kernels import backends, ops

LENGTHS = (0, 1, 2, 7, 8, 9, 129, 1134, 4097, 70_001)
MADE_FOR = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
# Each op's own rounding to the storage dtype, one unit either way; the tests hold the kernels to less.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}
PER_SCALE = 100
Lists = dict[str, list[Tensor]]
# Forms of adapt_norm_moments, and what plays the parts of firsts, seconds and buffers.
MOMENTS = [
    (ops.LINEAR, "", "w", ""),
    (ops.RATIO, "m", "w", ""),
    (ops.RATIO, "", "w", "m"),
    (ops.CENTERED, "m", "w", "explicit"),
    (ops.MAXIMUM, "m", "largest", ""),
    (ops.DELTA, "largest", "w", ""),
]


def tensors(precision: Precision) -> Lists:
    """Random operands on the CPU."""

    def randn(dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
        return [(scale * torch.randn(n)).to(dtype) for n in LENGTHS]

    values, state = precision.values, precision.state
    w = [(x.double().square() + 1e-6).to(state) for x in randn(state, 0.01)]
    return {
        "v": randn(values), "params": randn(values), "grads": randn(values, 0.01), "m": randn(state, 0.01), "w": w,
        "maxima": [torch.where(torch.rand(x.shape) < 0.5, x, 2 * x) for x in w], "explicit": randn(values),
        "largest": [x.abs() + 0.5 for x in randn(state)], **quantised(8), **quantised(4),
    }  # fmt: skip


def quantised(bits: int) -> Lists:
    """m and w as low-bit optimizers keep them: codes, scales of PER_SCALE elements each, and lookup tables."""
    lists: Lists = {}
    grid = torch.linspace(0, 1, 2**bits).square()
    for name, table, scale in (("m", grid - 0.5, 0.02), ("w", grid + 0.01, 1e-3)):
        lists[f"{name}{bits} codes"] = [torch.randint(256, (-(-n * bits // 8),), dtype=torch.uint8) for n in LENGTHS]
        lists[f"{name}{bits} scales"] = [scale * torch.rand(-(-n // PER_SCALE)) for n in LENGTHS]
        lists[f"{name}{bits} tables"] = [table] * len(LENGTHS)
    return lists


def placed(lists: Lists, device: torch.device) -> Lists:
    """The same values on `device`, each list at another offset of 0 to 3 elements into its memory."""

    def place(x: Tensor, offset: int) -> Tensor:
        memory = torch.empty(offset + x.numel(), dtype=x.dtype, device=device)
        memory[offset:].copy_(x)
        return memory[offset:]

    return {name: [place(x, (i + k) % 4) for k, x in enumerate(xs)] for i, (name, xs) in enumerate(lists.items())}


def one_meta_step(x: Lists, device: torch.device, backend: str, mode: int) -> Iterator[tuple[str, list[Tensor]]]:
    """The ops in the order of a meta step, with every optional operand; after each, what it wrote."""
    steps = [torch.tensor(7.0, device=device) for _ in x["v"]]
    norm_sq = ops.adapt_norm_adam(
        x["v"], x["grads"], x["m"], x["w"], x["maxima"], x["params"], steps, lr=LR, beta1=BETA1, beta2=BETA2, eps=EPS,
        weight_decay=0.01, maximize=mode == ops.EXACT, mode=mode, backend=backend,
    )  # fmt: skip
    yield "adapt_norm_adam", [norm_sq, *x["v"]]
    for bits in (8, 4):
        stored = [x[f"{moment}{bits} {part}"] for moment in "mw" for part in ("codes", "scales", "tables")]
        norm_sq = ops.adapt_norm_low_bit_adam(
            x["v"], x["grads"], *stored, steps, block_size=PER_SCALE, lr=LR, beta1=BETA1, beta2=BETA2, eps=EPS,
            mode=mode, backend=backend,
        )  # fmt: skip
        yield f"adapt_norm_low_bit_adam, {bits} bits", [norm_sq, *x["v"]]
    row = [0.9, 0.5, 0.4, 0.6, 1.2, 1e-3, 0.5, 0.5]
    coefficients = torch.tensor([row] * len(x["v"]), dtype=torch.float64, device=device)
    decay = {"weight_decay": 0.01, "maximize": mode == ops.EXACT}
    for form, firsts, seconds, buffers in MOMENTS:
        lists = (x[firsts] if firsts else [], x[seconds], x["params"], x[buffers] if buffers else [])
        norm_sq = ops.adapt_norm_moments(x["v"], x["grads"], *lists, coefficients, **decay, form=form, backend=backend)
        yield f"adapt_norm_moments, form {form}", [norm_sq, *x["v"]]
    lr = torch.tensor(300.0, device=device)
    norm_sq = ops.adapt_norm_scale(x["v"], 0.5, lr=lr, backend=backend)
    yield "adapt_norm_scale", [norm_sq, *x["v"]]
    norm, epsilon, degenerate = ops.step_size([norm_sq, norm_sq], ALPHA, TINY, backend=backend)
    yield "step_size", [norm, epsilon, degenerate.double()]
    rounding = ops.STOCHASTIC if mode == ops.EXACT else ops.NEAREST
    sums = ops.perturb(
        x["params"], x["v"], epsilon, ops.PLUS, rounding=rounding, seed=2**40 + 5, measure=True, backend=backend
    )
    yield "perturb PLUS", [sums, *x["params"]]
    ops.perturb(x["params"], x["v"], epsilon, ops.MINUS, backend=backend)
    yield "perturb MINUS", x["params"]
    ops.restore(x["params"], x["v"], backend=backend)
    yield "restore", x["params"]
    ops.central_difference(x["grads"], x["params"], x["explicit"], epsilon, norm, backend=backend)
    yield "central_difference", x["grads"]


def faults(backend: str, device: torch.device, dtypes: Sequence[str], report: Callable[[str], None]) -> int:
    """Number of ops whose result is not the reference's."""
    wrong = 0
    for name in dtypes:
        precision = PRECISIONS[name]
        for mode in (ops.PAPER, ops.EXACT):
            lists = tensors(precision)
            expected = one_meta_step(placed(lists, torch.device("cpu")), torch.device("cpu"), "reference", mode)
            found = one_meta_step(placed(lists, device), device, backend, mode)
            for (op, want), (_, got) in zip(expected, found, strict=True):
                distance = relative_distance([y.cpu() for y in got], want)
                if not distance <= TOLERANCE[precision.values]:
                    wrong += 1
                    report(f"{backend} {name} {op}: differs from the reference by {distance:.2g}")
        report(f"{backend} {name}: ran")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Run every backend that is made for the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=list(MADE_FOR))
    parser.add_argument("--backends", nargs="+", metavar="BACKEND", help="default: all that are made for the device")
    parser.add_argument("--dtypes", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    wrong = missing = 0
    for backend in options.backends or MADE_FOR[device.type]:
        why = backends.unavailable(backend, device)
        if why is None:
            wrong += faults(backend, device, options.dtypes, print)
        else:
            print(f"{backend} backend unavailable: {why}", file=sys.stderr)
            missing += 1
    return 1 if wrong else 3 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
