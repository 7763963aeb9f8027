"""The element-wise part of a meta step as CUDA graphs, captured once and replayed with other numbers in its memory.

Without a GPU the same test runs with stand-ins for the capture: the functions themselves, and torch.compile, which also
traces once and then must not look at a number on the host again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from op_cases import needs_cpu_kernels, same_bits
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from sama_kernels import backends, ops

SHAPES = [(40, 30), (7,), (), (129,)]
Run = Callable[[], object]


class ElementWisePart:
    """What happens between the passes, on tensors that stay where they are; `fill` brings the numbers of a step."""

    def __init__(self, device: str, backend: str, mode: int) -> None:
        self.backend, self.mode = backend, mode
        self.theta, self.v, self.grads, self.m, self.w, self.plus, self.minus, self.explicit = (
            [torch.zeros(s, device=device) for s in SHAPES] for _ in range(8)
        )
        self.steps = [torch.zeros((), device=device) for _ in SHAPES]
        self.lr = torch.zeros((), device=device)
        # Three rows, not three numbers: a copy into a float64 tensor of no dimensions is lost under aot_eager (2.13).
        self.sizes = torch.zeros(3, device=device, dtype=torch.float64)  # norm, epsilon, degenerate

    def to_plus(self) -> None:
        """v <- D d; epsilon; theta -> theta+."""
        norm_sq = ops.adapt_norm_adam(
            self.v, self.grads, self.m, self.w, [], [], self.steps, lr=self.lr, beta1=0.9, beta2=0.99, eps=1e-8,
            weight_decay=0.0, maximize=False, mode=self.mode, backend=self.backend,
        )  # fmt: skip
        norm, epsilon, degenerate = ops.step_size([norm_sq], 0.3, 1e-30, backend=self.backend)
        self.sizes.copy_(torch.stack([norm, epsilon, degenerate.double()]))
        ops.perturb(self.theta, self.v, epsilon, ops.PLUS, backend=self.backend)

    def to_minus(self) -> None:
        """theta+ -> theta-."""
        ops.perturb(self.theta, self.v, self.sizes[1], ops.MINUS, backend=self.backend)

    def finish(self) -> None:
        """The difference quotient, and theta back."""
        ops.central_difference(
            self.plus, self.minus, self.explicit, self.sizes[1], self.sizes[0], backend=self.backend
        )  # fmt: skip
        ops.restore(self.theta, self.v, backend=self.backend)

    def whole(self) -> None:
        """All of it, as if the passes in between were free."""
        self.to_plus()
        self.to_minus()
        self.finish()

    def lists(self) -> list[list[Tensor]]:
        return [self.theta, self.v, self.grads, self.m, self.w, self.plus, self.minus, self.explicit]

    def fill(self, step: int) -> None:
        """New numbers in the same memory: another learning rate, another step count; no direct gradient at step 3."""
        generator = torch.Generator().manual_seed(step)
        for tensors in self.lists():
            for x in tensors:
                x.copy_(torch.randn(x.shape, generator=generator))
        for w, g in zip(self.w, self.grads, strict=True):
            w.copy_(0.01 * g.square() + 1e-3)
        if step == 3:
            for x in self.v:
                x.zero_()
        for t in self.steps:
            t.fill_(step + 1)
        self.lr.fill_(0.1 / step)

    def state(self) -> list[Tensor]:
        return [x.clone() for x in [*(x for part in self.lists() for x in part), self.sizes]]


def capture_cuda_graphs(functions: list[Run]) -> list[Run]:
    """Each function as a CUDA graph. Warmed up on the stream of the capture, for which Triton then knows the tables."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graphs = []
    for function in functions:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            function()
        graphs.append(graph.replay)
    return graphs


def capture_nothing(functions: list[Run]) -> list[Run]:
    """The functions, called once before as for a real capture."""
    for function in functions:
        function()
    return functions


def capture_by_compiler(functions: list[Run]) -> list[Run]:
    """Each function compiled without a graph break, and never again."""
    counters = [CompileCounterWithBackend("aot_eager") for _ in functions]
    compiled = [torch.compile(f, fullgraph=True, backend=c) for f, c in zip(functions, counters, strict=True)]
    capture_nothing(compiled)

    def replay(function: Run, counter: Any) -> Run:
        def run() -> None:
            function()
            assert counter.frame_count == 1

        return run

    return [replay(f, c) for f, c in zip(compiled, counters, strict=True)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


HOW = [
    *(("cpu", name, capture) for name in ("cpu", "reference") for capture in (capture_nothing, capture_by_compiler)),
    *(pytest.param("cuda", name, capture_cuda_graphs, marks=pytest.mark.gpu) for name in ("cuda", "triton")),
]


@pytest.mark.parametrize("mode", [ops.PAPER, ops.EXACT], ids=["paper", "exact"])
@pytest.mark.parametrize(("device", "backend", "capture"), HOW)
def test_replays_are_what_eager_calls_are(
    device: str, backend: str, capture: Callable[[list[Run]], list[Run]], mode: int
) -> None:
    why = backends.unavailable(backend, torch.device(device))
    if why is not None:
        pytest.skip(why)
    eager, replayed = (ElementWisePart(device, backend, mode) for _ in range(2))
    replayed.fill(9)
    to_plus, to_minus, finish = capture([replayed.to_plus, replayed.to_minus, replayed.finish])
    norms = []
    for step in range(1, 6):
        for part in (eager, replayed):
            part.fill(step)
        theta = [x.clone() for x in eager.theta]
        for call, replay in ((eager.to_plus, to_plus), (eager.to_minus, to_minus), (eager.finish, finish)):
            call()
            replay()
            assert all(map(same_bits, replayed.state(), eager.state()))
            if call != eager.finish and step != 3:
                assert not any(map(torch.equal, replayed.theta, theta))
        assert all(map(same_bits, replayed.theta, theta))
        norm, epsilon, degenerate = replayed.sizes.tolist()
        assert degenerate == (step == 3) == (epsilon == 0)
        norms.append(norm)
    assert len(set(norms)) == 5


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_cpu_kernels), "reference"])
def test_the_whole_part_is_one_compiled_function(backend: str, compiler: str) -> None:
    if compiler == "inductor" and (backend == "reference" or shutil.which("g++") is None):
        pytest.skip("compiles half a minute of C++ that is not ours")
    eager, compiled = (ElementWisePart("cpu", backend, ops.PAPER) for _ in range(2))
    counter = CompileCounterWithBackend(compiler)
    whole = torch.compile(compiled.whole, fullgraph=True, backend=counter)
    for step in range(1, 6):
        for part in (eager, compiled):
            part.fill(step)
        eager.whole()
        whole()
        for a, b in zip(compiled.state(), eager.state(), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-6, atol=1e-9)
    assert counter.frame_count == 1
