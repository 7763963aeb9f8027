"""Random inputs of `adapt_norm_low_bit_adam`, its results in float64, and what it must refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from op_cases import F32, F64, assert_as_good, clones, identical, randn, undecided
from torch import Tensor

from sama_kernels import ops
from sama_kernels.backends.reference import compute_dtype

LISTS = (
    "v", "grads", "exp_avg_codes", "exp_avg_scales", "exp_avg_tables", "exp_avg_sq_codes", "exp_avg_sq_scales",
    "exp_avg_sq_tables", "steps",
)  # fmt: skip
BITS = [8, 4]


class LowBit:
    """What four steps of an Adam leave that keeps its moments in `bits` bits, each tensor with a table of its own."""

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = F32, grad_dtype: torch.dtype | None = None,
        bits: int = 8, block_size: int = 256, mode: int = ops.PAPER, t: int = 7,
    ) -> None:  # fmt: skip
        self.bits, self.block_size, self.shapes = bits, block_size, shapes
        self.options: dict[str, Any] = {
            "block_size": block_size, "lr": 3e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "mode": mode,
        }  # fmt: skip
        self.v = randn(shapes, dtype)
        # Sizes of five orders of magnitude: in blocks with large cells the w of small ones is stored as nearly nothing.
        history = [[10 ** (-5 * torch.rand(s, dtype=F64)) * torch.randn(s, dtype=F64) for s in shapes] for _ in "1234"]
        self.grads = [g.to(grad_dtype or dtype) for g in history[-1]]
        m = [0.1 * sum(gs) for gs in zip(*history, strict=True)]
        w = [0.001 * sum(g * g for g in gs) for gs in zip(*history, strict=True)]
        for name, moments, signed in (("exp_avg", m, True), ("exp_avg_sq", w, False)):
            stored = [self._quantised(x.flatten(), self._table(signed, i)) for i, x in enumerate(moments)]
            for k, part in enumerate(("codes", "scales", "tables")):
                setattr(self, f"{name}_{part}", [parts[k] for parts in stored])
        self.steps = [torch.tensor(float(t), device="cpu")] * len(shapes)

    def _table(self, signed: bool, i: int) -> Tensor:
        grid = torch.linspace(-1 if signed else 0, 1, 2**self.bits)
        return grid * grid.abs() ** (1 + 0.1 * (i % 3))

    def _quantised(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        blocks = x.split(self.block_size) if x.numel() else ()
        scales = torch.tensor([b.abs().max() for b in blocks], dtype=F32)
        relative = torch.cat([b / s for b, s in zip(blocks, scales, strict=True)]) if blocks else x
        codes = torch.bucketize(relative.float(), (table[1:] + table[:-1]) / 2).to(torch.uint8)
        if self.bits == 4:
            codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
            codes = codes[::2] << 4 | codes[1::2]
        return codes, scales, table

    @property
    def lists(self) -> list[list[Tensor]]:
        return [getattr(self, name) for name in LISTS]

    def to(self, device: str) -> LowBit:
        """The same there, but for the step counters."""
        there = object.__new__(LowBit)
        there.__dict__.update(self.__dict__)
        for name in LISTS[:-1]:
            setattr(there, name, [x.to(device) for x in getattr(self, name)])
        return there

    def run(self, backend: str, **changed: Any) -> tuple[list[Tensor], Tensor]:
        v = clones(self.v)
        norm_sq = ops.adapt_norm_low_bit_adam(v, *self.lists[1:], **{**self.options, **changed}, backend=backend)
        return v, norm_sq

    def moment(self, name: str, i: int) -> Tensor:
        """As it is stored, value by value; the product in float32."""
        codes, scales, table = (getattr(self, f"{name}_{part}")[i].flatten() for part in ("codes", "scales", "tables"))
        if self.bits == 4:
            halves = [half for byte in codes.tolist() for half in divmod(byte, 16)]
            codes = torch.tensor(halves, dtype=torch.int64)
        numel = self.v[i].numel()
        scale = scales.repeat_interleave(min(self.block_size, numel))[:numel]
        return (table[codes[:numel].long()] * scale).view(self.v[i].shape).double()

    def exact(self, i: int) -> Tensor:
        """D d from Adam's formula in float64 (see op_cases.Adam.exact), at the moments put right."""
        return self._exact(i)[0]

    def _exact(self, i: int) -> tuple[Tensor, Tensor]:
        """And its size before the two terms of r cancel: what a rounding error is a part of."""
        k, t = self.options, self.steps[i].item()
        b1, b2 = k["beta1"], k["beta2"]
        c1, c2 = 1 - b1**t, 1 - b2**t
        d, g = self.v[i].double(), self.grads[i].double()
        m, w = self.moment("exp_avg", i), self.moment("exp_avg_sq", i)
        w = torch.maximum(w, (1 - b2) * g * g)
        if t == 1:
            m, w = (1 - b1) * g, (1 - b2) * g * g
        s = (w / c2).sqrt()
        q = s + k["eps"]
        ratio = torch.where(w == 0, 0.0, (1 - b2) * m * g / w)
        noise = 8 * torch.finfo(compute_dtype(self.v[i].dtype)).eps * (1 - b1)
        r = torch.where((1 - b1 - ratio).abs() <= noise, 0.0, 1 - b1 - ratio)
        tail = (1 - b1) * k["eps"] if k["mode"] == ops.EXACT else 0.0
        exact, size = (k["lr"] / c1 * (x * s + tail) / q**2 * d for x in (r, 1 - b1 + ratio.abs()))
        return undecided(exact, (1 - b1 - ratio).abs(), noise), size.abs()

    def assert_as_good(self, kernel: list[Tensor], plain: list[Tensor]) -> None:
        """Results of `run`. They span ten orders of magnitude, so that each error is counted in the element's size."""
        exact, sizes = zip(*map(self._exact, range(len(self.v))), strict=True)
        kernel_, plain_, exact_, sizes_ = (torch.cat([x.flatten() for x in xs]) for xs in (kernel, plain, exact, sizes))
        assert_as_good(kernel_, plain_, exact_, sizes=sizes_)


def _call(bits: int = 8, **changes: Any) -> Callable[[str], object]:
    def call(backend: str) -> object:
        case = LowBit([(4, 3), (5,)], bits=bits, block_size=5)
        arguments = {**dict(zip(LISTS, case.lists, strict=True)), **case.options, **changes}
        before = clones(arguments["v"])
        try:
            return ops.adapt_norm_low_bit_adam(**arguments, backend=backend)
        finally:
            assert all(map(identical, arguments["v"], before))

    return call


def _zeros(*numels: int, dtype: torch.dtype = F32) -> list[Tensor]:
    return [torch.zeros(n, dtype=dtype) for n in numels]


_ONE = torch.ones(())
ERRORS: list[tuple[Callable[[str], object], str]] = [
    (_call(v=[]), "adapt_norm_low_bit_adam: v is empty"),
    (_call(mode=2), r"mode must be 0 \(paper\) or 1 \(exact\), not 2"),
    (_call(block_size=0), r"block_size must be from 1 to 2\^30, not 0"),
    (_call(block_size=2**30 + 1), r"block_size must be from 1 to 2\^30, not 1073741825"),
    (_call(steps=[_ONE]), "adapt_norm_low_bit_adam: steps has 1 tensors, but v has 2"),
    (_call(steps=[_ONE, torch.ones(2)]), r"steps\[1\] must hold one number, but has shape \[2\]"),
    (_call(lr=torch.ones(3)), r"lr_tensor must hold one number, but has shape \[3\]"),
    (_call(v=[torch.ones(4, 1).expand(4, 3), torch.ones(5)]), r"v\[0\] is expanded"),
    (_call(grads=[torch.ones(4, 3), torch.ones(6)]), r"grads\[1\] has shape \[6\], but v\[1\] has shape \[5\]"),
    (_call(exp_avg_codes=_zeros(12, dtype=torch.uint8)), "exp_avg_codes has 1 tensors, but v has 2"),
    (_call(exp_avg_codes=_zeros(12, 5, dtype=torch.int8)), r"exp_avg_codes\[0\] is not uint8"),
    (
        _call(exp_avg_sq_codes=[torch.zeros(3, 4, dtype=torch.uint8).t()] * 2),
        r"exp_avg_sq_codes\[0\] is not contiguous",
    ),
    (_call(exp_avg_codes=_zeros(12, 6, dtype=torch.uint8)), r"exp_avg_codes\[1\] has 6 bytes, but v\[1\] needs 5"),
    (
        _call(4, exp_avg_sq_codes=_zeros(6, 2, dtype=torch.uint8)),
        r"exp_avg_sq_codes\[1\] has 2 bytes, but v\[1\] needs 3",
    ),
    (_call(exp_avg_scales=_zeros(3, 1, dtype=F64)), r"exp_avg_scales\[0\] is not float32"),
    (_call(exp_avg_sq_scales=_zeros(2, 1)), r"exp_avg_sq_scales\[0\] has 2 numbers, but v\[0\] has 3 blocks of 5"),
    (_call(exp_avg_scales=_zeros(3)), "exp_avg_scales has 1 tensors, but v has 2"),
    (_call(exp_avg_sq_tables=_zeros(256)), "exp_avg_sq_tables has 1 tensors, but v has 2"),
    (
        _call(exp_avg_tables=_zeros(128, 128)),
        r"exp_avg_tables\[0\] must have 256 entries, or 16 for .* 4 bits, not 128",
    ),
    (
        _call(exp_avg_sq_tables=_zeros(256, 16)),
        r"exp_avg_sq_tables\[1\] has 16 entries, but exp_avg_tables\[0\] has 256",
    ),
    (_call(exp_avg_tables=_zeros(256, 256, dtype=F64)), r"exp_avg_tables\[0\] is not float32"),
]
