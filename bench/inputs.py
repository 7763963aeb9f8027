"""The tensors that one list of shapes needs, and whether they fit into memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from bench.shapes import Shapes, elements

EPSILON = 0.5  # moves of the size of theta itself: a kernel that does nothing must not look right
STEP = 100.0
PER_SCALE = 256


@dataclass(frozen=True)
class Precision:
    """dtypes of parameters and gradients, and of Adam's moments."""

    values: torch.dtype
    state: torch.dtype


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "bf16-fp32state": Precision(torch.bfloat16, torch.float32),
    "bf16": Precision(torch.bfloat16, torch.bfloat16),
    "fp16-fp32state": Precision(torch.float16, torch.float32),
    "fp64": Precision(torch.float64, torch.float64),
}


class Inputs:
    """What the ops read: theta, a direct gradient d, the gradient of a step, Adam's moments, Adadelta's mean of squared
    deltas; never written.

    Random, as zeros or repeated values would be faster on some hardware.
    """

    def __init__(self, shapes: Shapes, precision: Precision, device: torch.device) -> None:
        def randn(dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
            return [torch.randn(shape, device=device).mul_(scale).to(dtype) for shape in shapes]

        self.precision = precision
        self.device = device
        self.numel = elements(shapes)
        self.theta, self.d = randn(precision.values), randn(precision.values)
        self.grads, self.m = randn(precision.values, 0.01), randn(precision.state, 0.01)
        # A step has added (1 - beta2) g^2, at most 1 % of g^2 here: a smaller w would be one that no step leaves, and D
        # a difference of equals, which nobody computes to 1e-5.
        self.w = [
            x.square_().add_(1e-6).add_(0.01 * g.to(x.dtype).square())
            for x, g in zip(randn(precision.state, 0.01), self.grads, strict=True)
        ]
        self.deltas = [x.square_() for x in randn(precision.state, 0.003)]
        # Adam keeps one counter per parameter. On a GPU they are there, as in fused and capturable optimizers: from
        # the CPU the reference backend would fetch them one by one.
        self.steps = [torch.tensor(STEP, device=device) for _ in shapes]
        self.epsilon = torch.tensor(EPSILON, dtype=torch.float64, device=device)
        self.norm_sq = torch.tensor(123.4, dtype=torch.float64, device=device)

    @cached_property
    def stored(self) -> list[list[Tensor]]:
        """Codes, scales and lookup tables of m, then those of w, as optimizers with 8-bit moments keep them."""
        grid = torch.linspace(-1, 1, 256, device=self.device)
        signed, unsigned = grid * grid.abs(), (grid / 2 + 0.5).square()
        return [*_quantised(self.m, signed), *_quantised(self.w, unsigned)]


def _quantised(moments: list[Tensor], table: Tensor) -> list[list[Tensor]]:
    lists: list[list[Tensor]] = [[], [], []]
    for x in moments:
        flat = x.flatten().float()
        blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % PER_SCALE)).view(-1, PER_SCALE)
        scales = blocks.abs().amax(1)
        codes = torch.bucketize(blocks / scales[:, None], (table[1:] + table[:-1]) / 2, out_int32=True)
        for parts, part in zip(lists, (codes.flatten()[: flat.numel()].to(torch.uint8), scales, table), strict=True):
            parts.append(part)
    return lists


def memory_needed(shapes: Shapes, precision: Precision) -> int:
    """Bytes for the inputs, the working lists of all contenders, a result to compare with, and what calls allocate."""
    value, state = precision.values.itemsize, precision.state.itemsize
    inputs_and_working_lists = elements(shapes) * (3 * value + 3 * state + 5 * value + value + 2)
    foreach_temporaries = elements(shapes) * 3 * max(value, state)
    reference_temporaries = 10 * max(4, value) * max(math.prod(shape) for shape in shapes)
    return inputs_and_working_lists + foreach_temporaries + reference_temporaries


def memory_available(device: torch.device) -> int:
    """Free bytes on the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo does not say how much memory is available")
