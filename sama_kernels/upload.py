"""Small values from the host to the GPU, without waiting for the copy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`: as they are if they lie there; from the CPU to a GPU through pinned memory, which torch
    keeps until the copy is done.

    Raises:
        RuntimeError: a CUDA graph is being captured, which would copy the same values again in every replay.
    """
    if values.device == device:
        return values
    if device.type != "cuda" or values.device.type == "cuda":  # from one GPU to another: in the order of their streams
        return values.to(device)
    if is_capturing(device):
        raise RuntimeError(
            "sama_kernels: step counters on the CPU, and Triton's tables of addresses, cannot be copied to the GPU"
            " while a CUDA graph is captured: keep the counters on the GPU (capturable=True); for Triton call the ops"
            " with the same tensors once before, on the stream of the capture"
        )
    return values.pin_memory().to(device, non_blocking=True)


def refuse_captured(values: Iterable[Tensor], v: Sequence[Tensor]) -> None:
    """Raise RuntimeError if a CUDA graph is being captured on the device of `v` and one of these numbers is on the CPU:
    its replays would have today's."""
    if torch.compiler.is_compiling() or not v or not is_capturing(v[0].device):
        return
    if any(x.device.type == "cpu" for x in values):
        raise RuntimeError(
            "sama_kernels: step counters and learning rates on the CPU would be the same in every replay of the CUDA"
            " graph that is being captured: keep them on the GPU (capturable=True, lr=torch.tensor(..., device='cuda'))"
        )


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream of `device`."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
