"""Buckets, and their all-reduce while the backward pass runs: on real processes, and with a collective that is slow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from sama_kernels.distributed import reduction
from sama_kernels.distributed.agreement import agree
from sama_kernels.distributed.buckets import MIB, Bucket, divide
from sama_kernels.distributed.reduction import OverlappedReduction

SHAPES: list[tuple[int, ...]] = [(3, 4), (), (7,), (0,), (5, 1, 2), (31,)]
DTYPES = [torch.float32, torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float64]


def tensors() -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape, dtype in zip(SHAPES, DTYPES, strict=True)]


@pytest.mark.parametrize("mib", [1e-9, 40 / MIB, 100 / MIB, 1.0])
def test_every_tensor_has_its_place(mib: float) -> None:
    like = tensors()
    buckets = divide(dict(enumerate(like)), torch.device("cpu"), mib)
    assert sorted(row for b in buckets for row in b.rows) == list(range(len(like)))
    for b in buckets:
        assert b.rows == sorted(b.rows, reverse=True)
        assert len({like[row].dtype for row in b.rows}) == 1
        assert len(b.rows) == 1 or b.flat.numel() * b.flat.element_size() <= mib * MIB
        assert sum(view.numel() for view in b.views) == b.flat.numel()
        for row, view in zip(b.rows, b.views, strict=True):
            assert (
                view.shape == like[row].shape
                and view.untyped_storage().data_ptr() == b.flat.untyped_storage().data_ptr()
            )
            view.fill_(row)  # no two share a place
        assert torch.equal(
            b.flat,
            torch.cat([torch.full((view.numel(),), row) for row, view in zip(b.rows, b.views, strict=True)]).to(
                b.flat.dtype
            ),
        )
    if mib == 1e-9:
        assert len(buckets) == len(like)
    if mib == 1.0:
        assert len(buckets) == 3  # one per dtype


def _sum_in_any_order(rank: int, world: int, mib: float) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(rank)
    grads = tensors()
    reduce = OverlappedReduction(dict(enumerate(grads)), grads[0].device, None, mib, prepare=Bucket.zero_missing)
    order = torch.randperm(len(grads)).tolist()  # another one on every rank
    for row in order[: len(order) - rank % 2]:  # an odd rank never gets its last gradient
        reduce.view(row).copy_(grads[row])
        reduce.ready(row)
    if rank % 2:
        grads[order[-1]].zero_()
    reduce.wait()
    return grads, [v.clone() for v in map(reduce.view, reduce.rows)]


@pytest.mark.parametrize("world", [2, 3])
def test_sums_whatever_the_order_and_with_gradients_missing(world: int) -> None:
    results = run_ranks(world, _sum_in_any_order, 50 / MIB)
    for row in range(len(SHAPES)):
        expected = torch.stack([grads[row].double() for grads, _ in results]).sum(0)
        for _, sums in results:
            assert torch.equal(sums[row], results[0][1][row])  # the same bits everywhere
            torch.testing.assert_close(
                sums[row].double(),
                expected,
                rtol=2 * torch.finfo(sums[row].dtype).eps * world,
                atol=1e-2 if sums[row].dtype == torch.bfloat16 else 1e-6,
            )


class SlowCollective:
    """Stands in for all_reduce: the sum is there only once `wait` has been called."""

    log: list[str]

    def __init__(self) -> None:
        self.log = []

    def all_reduce(self, flat: Tensor, group: Any, async_op: bool) -> Any:
        assert async_op
        number = sum(entry.startswith("send") for entry in self.log)
        self.log.append(f"send {number}")
        result = flat * 2
        flat.fill_(float("nan"))  # whoever looks too early sees this

        class Work:
            def wait(work) -> None:
                self.log.append(f"wait {number}")
                flat.copy_(result)

        return Work()


def test_buckets_are_sent_when_complete_and_read_only_after_their_event(monkeypatch: pytest.MonkeyPatch) -> None:
    collective = SlowCollective()
    monkeypatch.setattr(reduction.dist, "all_reduce", collective.all_reduce)
    torch.manual_seed(0)
    grads = [torch.randn(10) for _ in range(5)]

    def prepare(bucket: Bucket) -> None:
        bucket.zero_missing()
        collective.log.append(f"prepare {bucket.rows}")

    reduce = OverlappedReduction(
        dict(enumerate(grads)), grads[0].device, None, 80 / MIB,  # two to a bucket: rows [4, 3], [2, 1], [0]
        prepare=prepare,
        arrived=lambda b: collective.log.append(f"arrived {b.rows} {bool(b.flat.isfinite().all())}"),
    )  # fmt: skip
    for row in (2, 1):  # complete, but not the next in line: the other ranks may have another order
        reduce.view(row).copy_(grads[row])
        reduce.ready(row)
    assert collective.log == []
    for row in (4, 3):
        reduce.view(row).copy_(grads[row])
        reduce.ready(row)
    assert collective.log == ["prepare [4, 3]", "send 0", "prepare [2, 1]", "send 1"]
    reduce.wait()  # row 0 never came
    assert collective.log[4:] == [
        "prepare [0]", "send 2", "wait 0", "arrived [4, 3] True", "wait 1", "arrived [2, 1] True", "wait 2",
        "arrived [0] True",
    ]  # fmt: skip
    for got, grad in zip(map(reduce.view, reduce.rows), [torch.zeros(10), *grads[1:]], strict=True):
        assert torch.equal(got, 2 * grad)


def _disagree(rank: int, world: int) -> list[str]:
    said = []
    for description in (
        {"meta_params": (((2, rank), "torch.float32"),)},
        {"meta_params": (((2,), "torch.float32"),) * (1 + rank)},
        {"meta_params": (((2,), "torch.float32"),), "sync": "full" if rank else "final"},
    ):
        try:
            agree(None, description, torch.device("cpu"))
        except ValueError as error:
            said.append(str(error))
    agree(None, {"meta_params": (((2,), "torch.float32"),)}, torch.device("cpu"))
    dist.barrier()
    return said


def test_ranks_that_disagree_are_told_so_before_anything_is_reduced() -> None:
    results = run_ranks(2, _disagree)
    assert results[0] == results[1] and len(results[0]) == 3
    assert results[0][0].startswith(
        "meta_params: the ranks disagree: rank 0 has ((2, 0), 'torch.float32') as tensor 0, rank 1 has ((2, 1)"
    )
    assert "rank 0 has 1 tensors, rank 1 has 2 tensors" in results[0][1]
    assert results[0][2].startswith("sync: the ranks disagree: rank 0 has 'final', rank 1 has 'full'")
