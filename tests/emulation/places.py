"""Where the CUDA kernels run in the tests: emulated on the CPU, or on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from low_bit_cases import LowBit
from moments_cases import Moments
from op_cases import F64, Adam
from torch import Tensor

import emulation
from sama_kernels import backends, ops


@dataclass
class Place:
    """Where the kernels run: `backend` for the ops, `device` for the tensors."""

    backend: str
    device: str

    def put(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The same values, strides, offsets and gaps there; nothing shared with `tensors`."""
        moved = []
        for x in tensors:
            whole = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
            there = whole.detach().clone().to(self.device)
            moved.append(there.as_strided(x.shape, x.stride(), x.storage_offset()))
        return moved

    def scalar(self, value: float, dtype: torch.dtype = F64) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=self.device)

    def reading_scalars(self) -> Any:
        """Scalars in this context are read by the kernels, not by the host."""
        return emulation.scalars_on_device() if self.backend == "emulated" else nullcontext()

    def adam(self, case: Adam, **changed: Any) -> tuple[list[Tensor], Tensor]:
        """`Adam.run` here; results on the CPU."""
        there = object.__new__(Adam)
        there.__dict__.update(case.__dict__)
        for name in ("v", "grads", "exp_avgs", "exp_avg_sqs", "maxima", "params"):
            setattr(there, name, self.put(getattr(case, name)))
        v = there.v
        lists = (there.grads, there.exp_avgs, there.exp_avg_sqs, there.maxima, there.params, case.steps)
        norm_sq = ops.adapt_norm_adam(v, *lists, **{**case.scalars, **changed}, backend=self.backend)
        return cpu(v), norm_sq.cpu()

    def moments(self, case: Moments) -> tuple[list[Tensor], Tensor]:
        """`Moments.run` here; results on the CPU."""
        v, *lists = map(self.put, case.lists)
        coefficients = case.coefficients.to(self.device)
        norm_sq = ops.adapt_norm_moments(v, *lists, coefficients, **case.scalars, backend=self.backend)
        return cpu(v), norm_sq.cpu()

    def low_bit(self, case: LowBit, **changed: Any) -> tuple[list[Tensor], Tensor]:
        """`LowBit.run` here; results on the CPU."""
        v, *lists = map(self.put, case.lists[:-1])
        options = {**case.options, **changed}
        norm_sq = ops.adapt_norm_low_bit_adam(v, *lists, case.steps, **options, backend=self.backend)
        return cpu(v), norm_sq.cpu()


def cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.cpu() for x in tensors]


def shifted(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies that begin at a random one of the first eight elements of their storage."""
    copies = []
    for x in tensors:
        shift = int(torch.randint(0, 8, ()))
        storage = torch.full((x.numel() + shift + 5,), 7.0, dtype=x.dtype)
        copies.append(storage.as_strided(x.shape, x.contiguous().stride(), shift).copy_(x))
    return copies


def use_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops take backend="emulated" too; the test is skipped where nothing can be compiled."""
    if emulation.COMPILER is None:
        pytest.skip("no C++ compiler")
    emulation.library()
    compiled = backends.kernel

    def kernel(op: str, backend: str) -> Callable[..., Any]:
        return getattr(torch.ops.sama_emulated, op).default if backend == "emulated" else compiled(op, backend)

    monkeypatch.setattr(backends, "kernel", kernel)


@pytest.fixture(name="place", params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def place_fixture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param == "cuda":
        why_not = backends.unavailable("cuda", torch.device("cuda"))
        if why_not is not None:
            pytest.skip(why_not)
        return Place("cuda", "cuda")
    use_emulation(monkeypatch)
    return Place("emulated", "cpu")
