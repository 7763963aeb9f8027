"""The element-wise part of a meta step as CUDA graphs, captured once and replayed with other numbers in its memory.

Without a GPU the same test runs with stand-ins for the capture: the launches of the CUDA kernels in emulation, with the
parameters that they were captured with (the Triton kernels: triton_contract.py); the functions themselves, and
torch.compile, which also traces once and then must not look at a number on the host again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import emulation
import pytest
import torch
from captured import ADAPTATIONS, Capture, ElementWisePart, Run, capture_by_mode, check_replays
from emulation.places import use_emulation
from op_cases import needs_cpu_kernels
from torch._dynamo.testing import CompileCounterWithBackend

from sama_kernels import backends, ops, upload


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


def emulated_kernels(_: Capture, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Run]:
    """The launches of csrc/cuda, which find step counters and learning rates in memory, as on a GPU."""
    with emulation.scalars_on_device():
        return emulation.captured(lambda: func(*args, **kwargs))


HOW = [
    *(("cpu", name, capture_nothing) for name in ("cpu", "reference")),
    ("cpu", "emulated", capture_by_mode(emulated_kernels)),
    *(("cuda", name, capture_cuda_graphs) for name in ("cuda", "triton")),
]
CASES = [
    *(("cpu", name, capture_by_compiler, a) for name in ("cpu", "reference") for a in ("paper", "exact")),
    *(
        pytest.param(device, name, capture, a, marks=pytest.mark.gpu if device == "cuda" else ())
        for device, name, capture in HOW
        for a in ADAPTATIONS
    ),
]


@pytest.mark.parametrize(("device", "backend", "capture", "adaptation"), CASES)
def test_replays_are_what_eager_calls_are(
    monkeypatch: pytest.MonkeyPatch, device: str, backend: str, capture: Callable[[list[Run]], list[Run]],
    adaptation: str,
) -> None:  # fmt: skip
    if backend == "emulated":
        use_emulation(monkeypatch)
    else:
        why = backends.unavailable(backend, torch.device(device))
        if why is not None:
            pytest.skip(why)
    check_replays(lambda: ElementWisePart(device, backend, adaptation), capture)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_cpu_kernels), "reference"])
def test_the_whole_part_is_one_compiled_function(backend: str, compiler: str) -> None:
    if compiler == "inductor" and (backend == "reference" or shutil.which("g++") is None):
        pytest.skip("compiles half a minute of C++ that is not ours")
    eager, compiled = (ElementWisePart("cpu", backend, "paper") for _ in range(2))
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


@pytest.mark.parametrize("what", ["steps", "lr", "scale"])
def test_numbers_on_the_cpu_are_refused_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Every replay would have today's."""
    v, m, w = ([torch.rand(5)] for _ in range(3))
    monkeypatch.setattr(upload, "is_capturing", lambda device: True)
    on_device, on_host = torch.empty((), device="meta"), torch.ones(())
    options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "maximize": False, "mode": ops.EXACT}
    step, lr = (on_host, on_device) if what == "steps" else (on_device, on_host)
    with pytest.raises(RuntimeError, match="on the CPU would be the same in every replay of the CUDA graph"):
        if what == "scale":
            ops.adapt_norm_scale(v, 0.5, lr=lr, backend="reference")
        else:
            ops.adapt_norm_adam(v, m, m, w, [], [], [step], lr=lr, backend="reference", **options)
