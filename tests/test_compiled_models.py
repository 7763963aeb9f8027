"""Meta steps with torch.compile: the same numbers, compiled a fixed number of times, and no module forgotten."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import flat, relative_error, snapshot
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import sama_kernels as sk
from sama_kernels import checks
from sama_kernels.ownership import own

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
BACKENDS = ["aot_eager", pytest.param("inductor", marks=needs_compiler)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@dataclass
class Loop:
    """A training loop: a classifier with learned data weights, ordinary or compiled in the given way."""

    net: nn.Module
    weigher: nn.Module
    base_loss: Callable[[], Tensor]
    meta_loss: Callable[[], Tensor]
    base_step: Callable[[], object]
    optimizer: torch.optim.Optimizer

    def run(self, steps: int, after: Callable[[], object] = lambda: None) -> list[Tensor]:
        """The meta gradients of `steps` base and meta steps."""
        grads = []
        for _ in range(steps):
            self.base_step()
            out = sk.meta_grad(
                self.base_loss, self.meta_loss, base_params=self.net, meta_params=self.weigher,
                optimizer=self.optimizer, alpha=0.01,
            )  # fmt: skip
            grads.append(flat(out.grads))
            after()
        return grads


def loop(way: str, backend: Any, net: nn.Module | None = None, inputs: Tensor | None = None) -> Loop:
    torch.manual_seed(0)
    net = net or Net()
    net = net.double()
    weigher = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1), nn.Sigmoid()).double()
    inputs = torch.randn(2, 24, 5, dtype=torch.float64) if inputs is None else inputs
    labels = torch.randint(0, 3, inputs.shape[:2])

    def compiled(at: str, function: Any) -> Any:
        return torch.compile(function, backend=backend) if way == at else function

    model, weights = compiled("model", net), compiled("weigher", weigher)
    if way == "in place":
        net.compile(backend=backend)

    def losses(k: int) -> Tensor:
        output = model(inputs[k])
        return F.cross_entropy(getattr(output, "logits", output), labels[k], reduction="none")

    def base_loss() -> Tensor:
        each = losses(0)
        return (weights(sk.stop_gradient(each)[:, None]).squeeze(1) * each).mean()

    base = compiled("recorded closure", sk.recorded(compiled("closures", base_loss)))
    optimizer = torch.optim.Adam(net.parameters(), lr=torch.tensor(0.02, dtype=torch.float64))
    optimizer_step = compiled("optimizer step", optimizer.step)

    def base_step() -> None:
        optimizer.zero_grad()
        base().backward()
        optimizer_step()

    return Loop(
        net, weigher, base, compiled("closures", lambda: losses(1).mean()), compiled("base step", base_step), optimizer
    )


WAYS = ["model", "in place", "weigher", "closures", "recorded closure", "optimizer step", "base step"]


@pytest.mark.parametrize("way", WAYS)
def test_compiled_loops_give_the_same_meta_gradients(way: str) -> None:
    """And compile all they need in the first two steps, without a warning."""
    plain = loop("nothing", None)
    expected = plain.run(5)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = loop(way, counter)
    counts: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = compiled.run(5, after=lambda: counts.append(counter.frame_count))
    assert not [str(w.message) for w in caught if any(word in str(w.message) for word in ("hook", "Dynamo", "sama"))]
    assert expected[-1].norm() > 0
    # torch's Adam, compiled, computes 1 - beta^t in float32.
    tolerance = 1e-4 if way in ("optimizer step", "base step") else 1e-9
    for a, b in zip(got[1:], expected[1:], strict=True):  # D is 0 at Adam's first step
        assert relative_error(a, b) < tolerance
    assert counts[-1] == counts[1] and counts[0] >= (way != "recorded closure")


@needs_compiler
@pytest.mark.parametrize("way", ["model", "closures"])
def test_inductor_gives_the_same_meta_gradients(way: str) -> None:
    expected, got = loop("nothing", None).run(3), loop(way, "inductor").run(3)
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert relative_error(a, b) < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
def test_transformers_bert(backend: str) -> None:
    transformers = pytest.importorskip("transformers")
    if backend == "inductor" and torch.__version__.startswith("2.11."):
        pytest.skip("this model's own backward pass fails in float64 with torch 2.11's inductor")
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 16}
    config = transformers.BertConfig(
        **sizes, num_hidden_layers=1, num_attention_heads=2, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    results = []
    counter = CompileCounterWithBackend(backend)
    counts: list[int] = []
    for way in ("nothing", "model"):
        torch.manual_seed(1)
        net = transformers.BertForSequenceClassification(config)
        run = loop(way, counter, net, torch.randint(1, 60, (2, 8, 6)))
        results.append(run.run(3, after=lambda: counts.append(counter.frame_count)))
    # With gradients for theta, and without; torch 2.11 uses one code for both.
    assert counts[2] == 0 and 1 <= counts[3] == counts[5] <= 2
    for a, b in zip(results[0][1:], results[1][1:], strict=True):
        assert relative_error(a, b) < 1e-8


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_dropout_is_replayed(backend: str) -> None:
    """The passes see the masks of the recorded call, although compiled code draws in its own way (by inductor) and
    is compiled separately for frozen parameters."""
    torch.manual_seed(0)
    net = Net(dropout=0.5).double()
    net.inner[1].eval()  # type: ignore[union-attr]
    model = torch.compile(net, backend=backend)
    x = torch.randn(24, 5, dtype=torch.float64)
    lam = torch.rand(24, dtype=torch.float64, requires_grad=True)
    seen: list[Tensor] = []

    def base_loss() -> Tensor:
        losses = model(x).square().sum(1)
        seen.append(losses.detach())
        return (lam * torch.exp(-sk.stop_gradient(losses)) * losses).mean()

    base_loss = sk.recorded(base_loss)
    for _ in range(3):
        base_loss()
        out = sk.meta_grad(
            base_loss, lambda: model(x).mean(), base_params=net, meta_params=[lam], optimizer=None, adaptation="none",
            alpha=1e-9,
        )  # fmt: skip
        assert not out.degenerate
        assert all(relative_error(losses, seen[0]) < 1e-7 for losses in (seen[1], seen[-1]))
        del seen[:]
        torch.rand(1)  # other masks next time


NOT_AN_ARGUMENT: list[nn.Module] = []


def batchnorm_loop(model: nn.Module, reach: Callable[[Tensor], Tensor]) -> Callable[[], sk.MetaGradient]:
    """Meta steps of a compiled model that are given no module at all, only tensors."""
    torch.manual_seed(0)
    head = nn.Linear(5, 1)
    compiled = torch.compile(head, backend="aot_eager")
    weights, x = torch.rand(24, requires_grad=True), torch.randn(24, 5)
    return lambda: sk.meta_grad(
        lambda: (weights * compiled(reach(x)).square().squeeze(1)).mean(),
        lambda: compiled(model(x)).square().mean(),
        base_params=list(head.parameters()),
        meta_params=[weights],
        optimizer=None,
        adaptation="none",
        alpha=0.1,
    )


@pytest.mark.parametrize("compile_it", [False, True])
def test_buffers_that_only_a_closure_reaches(compile_it: bool) -> None:
    norm: Any = nn.BatchNorm1d(5)
    statistics = tuple(norm.buffers())
    before, versions = snapshot(statistics), [b._version for b in statistics]
    model = torch.compile(norm, backend="aot_eager") if compile_it else norm
    out = batchnorm_loop(model, model)()
    assert not out.degenerate
    assert all(map(torch.equal, norm.buffers(), before)) and [b._version for b in norm.buffers()] == versions
    model(torch.randn(24, 5))
    assert norm.num_batches_tracked == 1


def test_scripted_modules_elsewhere_in_the_process_are_compared_too() -> None:
    """Their buffers are in no dict."""
    scripted = torch.jit.script(nn.BatchNorm1d(5))
    norm: Any = nn.BatchNorm1d(5)
    assert not batchnorm_loop(norm, norm)().degenerate
    assert scripted.num_batches_tracked == 0


@pytest.mark.parametrize("compile_it", [False, True])
def test_a_module_that_cannot_be_found_is_an_error(compile_it: bool) -> None:
    norm: Any = nn.BatchNorm1d(5)
    hidden: Any = nn.BatchNorm1d(5)
    graph = torch.fx.symbolic_trace(nn.Linear(2, 2))  # as one of torch.compile's own, which it takes apart meanwhile
    graph.register_buffer("constant", torch.ones(1))
    graph = torch.fx.symbolic_trace(nn.Linear(2, 2))  # as one of torch.compile's own, which it takes apart meanwhile
    graph.register_buffer("constant", torch.ones(1))
    NOT_AN_ARGUMENT[:] = [torch.compile(hidden, backend="aot_eager") if compile_it else hidden, graph]

    def reach(x: Tensor) -> Tensor:
        norm, graph = globals()["not_an_argument".upper()]
        graph.constant = torch.ones(1)
        return norm(x)

    meta_step = batchnorm_loop(norm, reach)
    with pytest.raises(RuntimeError, match=r"buffers of BatchNorm1d changed.*functools\.partial"):
        meta_step()
    NOT_AN_ARGUMENT.clear()
    assert norm.num_batches_tracked == 0


def test_a_plain_detach_inside_compiled_code_is_noticed_once() -> None:
    torch.manual_seed(0)
    counter = CompileCounterWithBackend("aot_eager")
    net, weigher = Net().double(), nn.Linear(1, 1).double()
    x = torch.randn(24, 5, dtype=torch.float64)

    @torch.compile(backend=counter)
    def base_loss() -> Tensor:
        losses = net(x).square().sum(1, keepdim=True)
        return (weigher(losses.detach()) * losses).mean()

    def meta_step() -> sk.MetaGradient:
        return sk.meta_grad(
            base_loss, lambda: net(x).square().mean(), base_params=net, meta_params=weigher, optimizer=None,
            adaptation="none",
        )  # fmt: skip

    with pytest.warns(UserWarning, match="stop_gradient"):
        meta_step()
    count = counter.frame_count
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        meta_step()
    assert counter.frame_count == count == 1  # compiled, not given up on, and not once more for the watch


def test_stop_gradient_and_fullgraph_exclude_each_other() -> None:
    compiled = torch.compile(lambda x: sk.stop_gradient(x) * x, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"function `stop_gradient`"):
        compiled(torch.ones(2))


def test_gradients_are_taken_without_a_copy_after_a_failed_compilation() -> None:
    """It leaves torch.compile's evaluation of frames behind, under which Python counts one reference more."""
    compiled = torch.compile(lambda x: sk.stop_gradient(x) * x, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(torch.ones(2))
    grads: list[Tensor | None] = [torch.ones(3), torch.ones(6).view(2, 3)]
    places = [g.data_ptr() for g in grads if g is not None]
    assert [g.data_ptr() for g in own(grads, [torch.ones(3), torch.ones(2, 3)]) if g is not None] == places


def test_cuda_graphs_of_the_compiler_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for torch's manager of these graphs, which exists once a model has run with them."""
    name = "torch._inductor.cudagraph_trees"
    managers = {0: None, 1: object()}
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(get_manager=lambda index, create: managers[index]))  # type: ignore[arg-type]
    checks.no_graph_memory(torch.device("cpu"))
    checks.no_graph_memory(torch.device("cuda", 0))
    with pytest.raises(NotImplementedError, match=r"reduce-overhead.*max-autotune-no-cudagraphs"):
        checks.no_graph_memory(torch.device("cuda", 1))


@pytest.mark.gpu
def test_cuda_graphs_of_the_compiler_are_noticed_on_a_gpu() -> None:
    net = nn.Linear(4, 1).cuda()
    model = torch.compile(net, mode="reduce-overhead")
    lam, x = torch.rand(8, device="cuda", requires_grad=True), torch.randn(8, 4, device="cuda")

    def base_loss() -> Tensor:
        return (lam * model(x).square().squeeze(1)).mean()

    for _ in range(4):  # warms up, then records
        base_loss().backward()
        net.zero_grad()
    with pytest.raises(NotImplementedError, match="reduce-overhead"):
        sk.meta_grad(
            base_loss, lambda: net(x).mean(), base_params=net, meta_params=[lam], optimizer=None, adaptation="none"
        )
