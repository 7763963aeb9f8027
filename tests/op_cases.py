"""Random inputs, exact results and tolerances for the tests of the ops."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sama_kernels import backends, ops
from sama_kernels.backends import reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F32, F64, BF16, F16]
SEED = int(os.environ.get("SAMA_TEST_SEED", random.SystemRandom().randrange(2**31)))

# A kernel may be twice as far from the float64 result as plain PyTorch in the same dtype, plus this times the largest
# result. Without the "plus", a reference that happens to be exact (one element, or one that dwarfs all others) would
# allow nothing.
ATOL = {F32: 5e-7, F64: 1e-15, BF16: 4e-3, F16: 5e-4}

needs_cpu_kernels = pytest.mark.skipif(
    backends.unavailable("cpu", torch.device("cpu")) is not None, reason="installed without compiled kernels"
)


def free_memory() -> int:
    """Bytes of the GPU that a test may take, without what this process keeps from the tests before it."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def randn(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = F32, scale: float = 1.0) -> list[Tensor]:
    return [(torch.randn(shape) * scale).to(dtype) for shape in shapes]


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.clone() for x in tensors]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, except that one NaN is as good as another: torch's own kernels do not agree on which."""
    return bool(((reference.bits(a) == reference.bits(b)) | (a.isnan() & b.isnan())).all())


def identical(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN payloads and signs of zeros included."""
    return torch.equal(reference.bits(a), reference.bits(b))


def assert_close(kernel: Tensor, plain: Tensor, units: int = 8) -> None:
    """Equal but for a few units in the last place, NaN and Inf included.

    Not the same bits where a square root is involved: torch's is off by one unit for 0.6 % of all float32 arguments
    (Intel MKL), that of the kernels is correctly rounded.
    """
    info = torch.finfo(kernel.dtype)
    atol = 4 * info.smallest_normal * info.eps
    torch.testing.assert_close(kernel, plain, rtol=units * info.eps, atol=atol, equal_nan=True)


def assert_as_good(
    kernel: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0, sizes: Tensor | None = None
) -> None:
    """`kernel` is at most `factor` times as far from `exact` (float64) as `plain`, the reference backend, is. Where
    `exact` is not finite nothing is compared. With `sizes` each error is counted in parts of its own, for results of
    very different sizes, the largest of which would hide all others and decide alone."""
    if exact.numel() == 0:
        return
    finite = exact.isfinite() & plain.isfinite()
    assert torch.equal(kernel.isfinite() & exact.isfinite(), finite)
    if not finite.any():
        return
    scale = (exact[finite].abs().max() if sizes is None else sizes[finite]).clamp(min=1e-300)
    error, allowed = (((x.double() - exact)[finite].abs() / scale).max() for x in (kernel, plain))
    assert error <= factor * allowed + ATOL[kernel.dtype]


def undecided(exact: Tensor, size: Tensor, limit: Tensor | float) -> Tensor:
    """`exact` with NaN, which `assert_as_good` leaves out, where `size` is so close to a limit between two formulas
    that a unit in the last place decides which one holds."""
    return torch.where((size - limit).abs() < 1e-3 * limit, torch.nan, exact)


class Adam:
    """Random inputs of `adapt_norm_adam` that a run of Adam could have produced."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, state: torch.dtype, **options: Any):
        options = {"maximize": False, "amsgrad": False, "weight_decay": 0.0, "mode": ops.PAPER, "t": 7, **options}
        history = [randn(shapes, F64, 0.01) for _ in range(4)]
        self.v = randn(shapes, dtype)
        self.grads = [g.to(dtype) for g in history[-1]]
        self.exp_avgs = [(0.1 * sum(gs)).to(state) for gs in zip(*history, strict=True)]
        self.exp_avg_sqs = [(0.001 * sum(g * g for g in gs)).to(state) for gs in zip(*history, strict=True)]
        self.maxima = []
        if options["amsgrad"]:  # half of them are the maximum of this step
            self.maxima = [torch.where(torch.rand(w.shape) < 0.5, w, 2 * w) for w in self.exp_avg_sqs]
        self.params = randn(shapes, dtype) if options["weight_decay"] else []
        self.steps = [torch.tensor(float(options.pop("t")), device="cpu")] * len(shapes)
        self.amsgrad = options.pop("amsgrad")
        self.scalars = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, **options}

    def run(self, backend: str, **changed: Any) -> tuple[list[Tensor], Tensor]:
        v = clones(self.v)
        lists = (self.grads, self.exp_avgs, self.exp_avg_sqs, self.maxima, self.params, self.steps)
        norm_sq = ops.adapt_norm_adam(v, *lists, **{**self.scalars, **changed}, backend=backend)
        return v, norm_sq

    def exact(self, i: int) -> Tensor:
        """D d from the formula of DESIGN: lr/c1 [(1-b1)/q - (1-b2) m g / (c2 s q^2)], in float64; see `undecided`."""
        k = self.scalars
        t, b1, b2 = self.steps[i].item(), k["beta1"], k["beta2"]
        c1, c2 = 1 - b1**t, 1 - b2**t
        d, g, m, own = (x[i].double() for x in (self.v, self.grads, self.exp_avgs, self.exp_avg_sqs))
        w = self.maxima[i].double() if self.amsgrad else own
        s = (w / c2).sqrt()
        q = s + k["eps"]
        g = -g if k["maximize"] else g
        if k["weight_decay"]:
            g = g + k["weight_decay"] * (self.params[i].double() + k["lr"] / c1 * m / q)
        second = (1 - b2) * m * g / (c2 * s) * (own == w)
        noise = 8 * torch.finfo(self.exp_avgs[i].dtype).eps * (1 - b1)
        r = ((1 - b1) - second / s).abs()
        second = undecided(torch.where(r <= noise, (1 - b1) * s, second), r, noise)
        first = (1 - b1) * (q if k["mode"] == ops.EXACT else s)
        return k["lr"] / c1 * (first - second) / q**2 * d * (-1 if k["maximize"] else 1)
