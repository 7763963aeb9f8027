"""Peak memory of a few training steps, in a way that compares methods fairly on a CPU as well as on a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

CPU_MEASURE = "largest total size of the tensors alive at one time, counted at every PyTorch operation"
CUDA_MEASURE = "torch.cuda.max_memory_allocated, less what was allocated before"


class LiveTensorBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make within the block, and the most that are alive at one time.

    The process's resident memory would not do: the allocator keeps freed pages, so it shows the largest run so far.
    Work space inside a single operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the storages of its results that are new."""
        # A view of a tensor from before the block, such as the texts, is a result but not new memory.
        tree_map_only(Tensor, lambda tensor: self._meet(tensor, counts=False), (args, kwargs))
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, lambda tensor: self._meet(tensor, counts=True), result)
        return result

    def _meet(self, tensor: Tensor, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counts else 0
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)  # runs when the storage dies, not when this wrapper does

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def peak_bytes(work: Callable[[], object], device: torch.device) -> tuple[int, str]:
    """Run ``work``; return the peak of the bytes it held beyond what was there before, and how that was measured."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, CUDA_MEASURE
    with LiveTensorBytes() as counter:
        work()
    return counter.peak, CPU_MEASURE
