"""A whole meta step on every device and backend: same result, nothing left changed, no wait for the GPU.

On a machine without a GPU the CPU's rows run, which keeps the code of the others honest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from problems import flat, relative_error, same_bits, snapshot
from torch import Tensor, nn

import sama_kernels as sk
from sama_experiments.common.memory import peak_bytes
from sama_kernels import backends

GPU = [("cuda", "reference"), ("cuda", "triton"), ("cuda", "cuda")]
WHERE = [("cpu", "reference"), ("cpu", "cpu"), *(pytest.param(*pair, marks=pytest.mark.gpu) for pair in GPU)]
everywhere = pytest.mark.parametrize(("device", "backend"), WHERE)


@pytest.fixture(autouse=True)
def available(request: pytest.FixtureRequest) -> None:
    device, backend = request.getfixturevalue("device"), request.getfixturevalue("backend")
    why = backends.unavailable(backend, torch.device(device))
    if why is not None:
        pytest.skip(why)


@dataclass
class Reweighting:
    """A small classifier with dropout and BatchNorm, and a Meta-Weight-Net, after a few steps of Adam."""

    net: nn.Module
    weigher: nn.Module
    optimizer: torch.optim.Optimizer
    base_loss: Callable[[], Tensor]
    meta_loss: Callable[[], Tensor]

    def meta_grad(self, backend: str, **options: Any) -> sk.MetaGradient:
        return sk.meta_grad(
            self.base_loss, self.meta_loss, base_params=self.net, meta_params=self.weigher,
            optimizer=self.optimizer, backend=backend, **{"alpha": 0.05, **options},
        )  # fmt: skip

    def state(self) -> list[Tensor]:
        """Everything that a meta step must leave as it is."""
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        moments = [x for s in self.optimizer.state.values() for x in s.values() if isinstance(x, Tensor)]
        return [*self.net.state_dict().values(), *self.weigher.state_dict().values(), *grads, *moments]


def reweighting(device: str, dtype: torch.dtype = torch.float32, dropout: float = 0.2, width: int = 64) -> Reweighting:
    torch.manual_seed(7)
    # No bias before BatchNorm: its gradient would be rounding noise, which Adam makes as large as any other.
    layers = [
        nn.Linear(20, width, bias=False),
        nn.BatchNorm1d(width),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(width, 3),
    ]
    net = nn.Sequential(*layers)
    weigher = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1), nn.Sigmoid())
    x, labels = torch.randn(2, 64, 20), torch.randint(0, 3, (2, 64))
    net, weigher = net.to(device, dtype), weigher.to(device)
    x, labels = x.to(device, dtype), labels.to(device)

    def losses(k: int) -> Tensor:
        return nn.functional.cross_entropy(net(x[k]).float(), labels[k], reduction="none")

    @sk.recorded
    def base_loss() -> Tensor:
        each = losses(0)
        return (weigher(sk.stop_gradient(each)[:, None]).squeeze(1) * each).mean()

    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        base_loss().backward()
        optimizer.step()
    weigher.zero_grad()
    return Reweighting(net, weigher, optimizer, base_loss, lambda: losses(1).mean())


@everywhere
def test_the_meta_gradient_is_that_of_float64_on_the_cpu(device: str, backend: str) -> None:
    """Without dropout, whose random numbers depend on the device."""
    exact = reweighting("cpu", torch.float64, dropout=0.0).meta_grad("reference")
    plain = reweighting("cpu", dropout=0.0).meta_grad("reference")
    out = reweighting(device, dropout=0.0).meta_grad(backend)
    assert not out.degenerate and all(g.device.type == device for g in out.grads)
    expected = flat(exact.grads)
    allowed = 2 * relative_error(flat(plain.grads).double(), expected) + 2e-3  # the passes differ by device
    assert relative_error(flat(out.grads).double().cpu(), expected) < allowed
    assert relative_error(out.norm.cpu(), exact.norm) < 1e-3


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_everything_is_left_as_it_was(device: str, backend: str, dtype: torch.dtype, rounding: str) -> None:
    problem = reweighting(device, dtype)
    before, rng = snapshot(tuple(problem.state())), torch.get_rng_state()
    cuda_rng = torch.cuda.get_rng_state() if device == "cuda" else None
    out = problem.meta_grad(backend, rounding=rounding)
    assert not out.degenerate and out.base_loss_plus != out.base_loss_minus
    assert all(same_bits(a, b) for a, b in zip(problem.state(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), rng)
    assert cuda_rng is None or torch.equal(torch.cuda.get_rng_state(), cuda_rng)
    assert torch.equal(flat(out.grads), flat(problem.meta_grad(backend, rounding=rounding).grads))  # the same masks


@everywhere
@pytest.mark.parametrize("where", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_everything_comes_back_after_an_error(
    device: str, backend: str, where: int, error: type[BaseException]
) -> None:
    problem = reweighting(device)
    before, original, calls = snapshot(tuple(problem.state())), problem.base_loss, iter(range(1, 9))

    def failing() -> Tensor:
        if next(calls) == where:
            raise error
        return original()

    problem.base_loss = failing
    with pytest.raises(error):
        problem.meta_grad(backend, hold="center")
    assert all(same_bits(a, b) for a, b in zip(problem.state(), before, strict=True))


@everywhere
def test_update_base_leaves_theta_minus(device: str, backend: str) -> None:
    problem = reweighting(device, dropout=0.0)
    theta = snapshot(tuple(problem.net.parameters()))
    out = problem.meta_grad(backend, update_base=True)
    step = flat([a - b for a, b in zip(problem.net.parameters(), theta, strict=True)]).double()
    assert step.norm().item() == pytest.approx(0.05, rel=1e-3)
    with torch.no_grad():
        expected = problem.meta_loss()  # moved along -v, so the meta loss falls for a small step
    assert expected < out.meta_loss


@everywhere
def test_extra_memory_is_one_theta(device: str, backend: str) -> None:
    if backend == "reference":
        pytest.skip("the readable backend makes copies")
    problem = reweighting(device, width=20_000)
    size = sum(p.numel() * p.element_size() for p in problem.net.parameters())
    saved = sum(b.numel() * b.element_size() for b in problem.net.buffers())  # statistics, which come back
    problem.meta_grad(backend)  # tables, code and handles that stay
    params, where = list(problem.net.parameters()), torch.device(device)
    plain = peak_bytes(lambda: torch.autograd.grad(problem.meta_loss(), params), where)[0]  # one theta: d, later v
    assert peak_bytes(lambda: problem.meta_grad(backend), where)[0] < plain + saved + 0.1 * size


@pytest.mark.gpu
@pytest.mark.parametrize(("device", "backend"), [pair for pair in GPU if pair[1] != "reference"])
@pytest.mark.parametrize("optimizer", ["foreach", "fused", "capturable"])
def test_the_host_never_waits_for_the_gpu(device: str, backend: str, optimizer: str) -> None:
    problem = reweighting(device)
    params = list(problem.net.parameters())
    problem.optimizer = torch.optim.Adam(params, lr=0.01, **{optimizer: True})
    for _ in range(2):
        problem.optimizer.zero_grad()
        problem.base_loss().backward()
        problem.optimizer.step()
    problem.meta_grad(backend)  # compiles and loads
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = problem.meta_grad(backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not out.degenerate
