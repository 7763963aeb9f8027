"""No stream reads or writes what another is still working on: the logic of the overlap, without a GPU.

On a GPU test_overlap.py runs the same code with real streams, and bench/gpu.sh with torch's CUDA sanitizer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel import Divided
from ranks import run_ranks
from streams import Race, watched
from torch import Tensor

from sama_kernels.distributed.reduction import OverlappedReduction


class Compressing:
    """As a communication hook that compresses: the sum is unpacked when the caller waits for it, on its stream."""

    def __call__(self, group: Any, bucket: Any) -> Compressing:
        self.buffer = bucket.buffer()
        self.work = dist.all_reduce(self.buffer, group=group, async_op=True)
        return self

    def wait(self) -> Tensor:
        assert self.work is not None
        self.work.wait()
        return self.buffer.mul_(1)


OPTIONS: dict[str, dict[str, Any]] = {
    "final": {"sync": "final"},
    "full": {"sync": "full"},
    "update": {"sync": "final", "update_base": True},
    "microbatches": {"sync": "full", "microbatches": True},
    "forward": {"sync": "full", "difference": "forward"},
    "exact": {"sync": "full", "difference": "exact"},
    "weight": {"sync": "final", "weight": (3.0, 2.0)},
    "comm hook": {"sync": "full", "comm_hook": Compressing()},
}
COMPUTE, NETWORK, DIRECT, META = range(4)


def _meta_step(rank: int, world: int, options: dict[str, Any], skipped: set[tuple[int, int]]) -> tuple[int, str]:
    """How many streams were used, and the race that was found."""
    problem = Divided()
    problem.explicit = True
    optimizer = problem.optimizer(2)
    problem.train(optimizer)
    try:
        with watched(skipped) as streams:
            out = problem.meta_grad(optimizer, group=dist.group.WORLD, bucket_mib=1e-4, **options)
            for grad in out.grads:
                grad.mul(2)  # what the caller does with it
    except Race as race:
        return 0, str(race)
    assert streams.recorded
    return len(streams.created), ""


@pytest.mark.parametrize("name", OPTIONS)
def test_a_meta_step_has_no_race(name: str) -> None:
    options = OPTIONS[name]
    ((streams, race),) = run_ranks(1, _meta_step, options, set())
    assert race == ""
    direct = options["sync"] == "full" or "update_base" in options
    assert streams == 3 + direct  # compute, the network's, and one for each gradient that is averaged


@pytest.mark.parametrize(
    ("waits", "whom"),
    [(COMPUTE, DIRECT), (DIRECT, COMPUTE), (DIRECT, NETWORK), (COMPUTE, META), (META, COMPUTE), (META, NETWORK),
     (NETWORK, DIRECT), (NETWORK, META)],
)  # fmt: skip
def test_a_stream_that_does_not_wait_is_found(waits: int, whom: int) -> None:
    """Every wait is needed: without any one of them there is a race."""
    ((_, race),) = run_ranks(1, _meta_step, OPTIONS["comm hook"], {(waits, whom)})
    assert "before it" in race


def test_gradients_that_come_on_several_streams() -> None:
    """A model whose branches run on streams of their own has its gradients there as well."""
    params = [torch.randn(3), torch.randn(4)]
    used = set()
    with watched() as streams:
        reduced = OverlappedReduction(dict(enumerate(params)), torch.device("cpu"), None, 1.0)
        assert len(reduced.buckets) == 1
        for row, p in enumerate(params):
            branch = streams.new()
            branch.wait_stream(streams.current)
            used.add(branch.number)
            with streams.on(branch):
                reduced.view(row).copy_(p)
                reduced.ready(row)
        reduced.wait()
        results: list[Tensor] = [reduced.view(row) * 1 for row in range(2)]
    # The allocator must not give the memory away before any of them is done with it.
    memory = reduced.buckets[0].flat.data_ptr()
    assert {s for m, s in streams.recorded if m == memory} >= used | {streams.current.number}
    assert all(torch.equal(result, p) for result, p in zip(results, params, strict=True))
