"""step_size: epsilon = alpha / ||v|| on the device. See sama_kernels/ops/step_size.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sama_kernels.backends.arguments import check_step_size
from sama_kernels.backends.triton.launch import run


def step_size(norm_sqs: Sequence[Tensor], alpha: float, tiny: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `sama_kernels.ops.step_size`."""
    check_step_size(norm_sqs)
    parts = torch.stack([x.detach().reshape(()) for x in norm_sqs]) if len(norm_sqs) > 1 else norm_sqs[0].detach()
    norm, epsilon = (torch.empty((), dtype=torch.float64, device=parts.device) for _ in range(2))
    degenerate = torch.empty((), dtype=torch.bool, device=parts.device)
    flag = degenerate.view(torch.uint8)
    run(step_size_kernel, 1, parts, norm, epsilon, flag, len(norm_sqs), float(alpha), float(tiny))
    return norm, epsilon, degenerate


@triton.jit(do_not_specialize=["parts", "norm", "epsilon", "degenerate", "count"])
def step_size_kernel(parts, norm, epsilon, degenerate, count: tl.int64, alpha: tl.float64, tiny: tl.float64):
    total = tl.full((), 0.0, tl.float64)
    for i in range(count):
        total += tl.load(parts + i)
    length = tl.sqrt(total)
    is_degenerate = ~((length > tl.full((), tiny, tl.float64)) & (length < float("inf")))  # NaN compares as False
    tl.store(norm, length)
    tl.store(epsilon, tl.where(is_degenerate, 0.0, tl.full((), alpha, tl.float64) / length))
    tl.store(degenerate, is_degenerate.to(tl.uint8))
