"""Small values from the host to the GPU, without waiting for the copy."""

from __future__ import annotations

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


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream of `device`."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
