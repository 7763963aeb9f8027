"""What a meta step must leave alone: parameters, .grad, buffers, random numbers; whatever interrupts it."""

from __future__ import annotations

import random
import sys
import threading

import numpy
import pytest
import torch
from guarded import BACKENDS, Broken, Explodes, Setting, assert_same, interrupted_at_every_line
from problems import flat, relative_error
from torch import Tensor, nn

import sama_kernels as sk
from sama_experiments.common.memory import peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_success_leaves_everything_as_it_was(backend: str, dtype: torch.dtype) -> None:
    setting = Setting(dtype)
    before = setting.state()
    out = setting.meta_grad(backend=backend)
    assert not out.degenerate and out.grads[0].norm() > 0
    assert_same(before, setting.state())


class Gpus:
    """The random number generators of two GPUs, of which torch knows the first as the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states = [torch.tensor([0], dtype=torch.uint8) for _ in range(2)]
        self.drawn: list[list[int]] = []
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: self.states[int(device)].clone())
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: self.states[int(device)].copy_(state))

    def draw(self) -> None:
        self.drawn.append([int(state) for state in self.states])
        for state in self.states:
            state.add_(1)


@pytest.mark.parametrize("recorded", [False, True])
def test_every_gpu_draws_the_same_numbers_in_both_passes(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen layers with dropout may be on another one than theta, and than the current one."""
    gpus, setting = Gpus(monkeypatch), Setting()

    def base_loss() -> Tensor:
        gpus.draw()
        return setting.base_loss()

    if recorded:
        base_loss = sk.recorded(base_loss)
        base_loss()
    gpus.states[1].add_(50)
    before = [int(state) for state in gpus.states]
    gpus.drawn.clear()
    setting.meta_grad(base_loss=base_loss)
    assert len(gpus.drawn) >= 2 and gpus.drawn == [[0, 0] if recorded else before] * len(gpus.drawn)
    assert [int(state) for state in gpus.states] == before


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize("call", [0, 1, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_in_a_closure_leaves_everything_as_it_was(backend: str, call: int, error: type[BaseException]) -> None:
    """Call 0 is the meta loss, 1 the centre, 2 and 3 the perturbed passes."""
    setting = Setting()
    before = setting.state()

    def failing_base() -> Tensor:
        loss = setting.base_loss()
        if setting.calls == first + call:
            setting.net[1].running_mean.fill_(7.0)  # type: ignore[union-attr, operator]
            raise error("on purpose")
        return loss

    def failing_meta() -> Tensor:
        setting.meta_loss()
        raise error("on purpose")

    first = sys.maxsize
    setting.meta_grad(backend=backend, base_loss=failing_base)  # the first meta step learns about stop_gradient
    first = setting.calls
    with pytest.raises(error, match="on purpose"):
        setting.meta_grad(
            backend=backend,
            base_loss=failing_base,
            **({"meta_loss": failing_meta} if call == 0 else {}),
            update_base=True,
        )
    assert_same(before, setting.state())


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_in_backward_leaves_everything_as_it_was(backend: str) -> None:
    setting = Setting()
    before = setting.state()
    with pytest.raises(Broken):
        setting.meta_grad(backend=backend, base_loss=lambda: Explodes.apply(setting.base_loss()))
    assert_same(before, setting.state())


@pytest.mark.parametrize("backend", BACKENDS)
def test_ctrl_c_at_every_line_leaves_everything_as_it_was(backend: str) -> None:
    setting = Setting()
    setting.meta_grad(backend=backend)  # the first meta step learns about stop_gradient
    assert interrupted_at_every_line(lambda: setting.meta_grad(backend=backend), setting.state) > 150


def test_dropout_masks_are_replayed() -> None:
    """Repeats from the same generator state agree bit for bit, and repeats with fresh masks agree closely, which they
    do not if the two passes draw masks of their own (then the difference of two losses is mostly mask)."""
    setting = Setting(torch.float64)
    torch.manual_seed(1)
    same = [setting.meta_grad().grads[0] for _ in range(3)]
    assert all(torch.equal(g, same[0]) for g in same)
    fresh = []
    for seed in range(6):
        torch.manual_seed(seed)
        fresh.append(setting.meta_grad().grads[0])
    mean = torch.stack(fresh).mean(0)
    spread = torch.stack([g - mean for g in fresh]).norm(dim=1).mean() / mean.norm()
    assert 0 < spread < 3

    different = setting.base_loss(), setting.base_loss()
    assert different[0] != different[1]  # the masks are there


def test_every_generator_is_replayed() -> None:
    setting = Setting()
    drawn: list[tuple[float, ...]] = []

    def base() -> Tensor:
        drawn.append((random.random(), float(numpy.random.rand()), float(torch.rand(1))))
        return setting.base_loss()

    setting.meta_grad(base_loss=base)
    assert len(drawn) >= 3 and len(set(drawn)) == 1


def test_buffers_of_modules_that_are_not_arguments() -> None:
    setting = Setting()
    other = nn.BatchNorm1d(5, momentum=None)
    before = [b.clone() for b in other.buffers()]
    out = sk.meta_grad(
        lambda: (setting.weights * (setting.net(other(setting.x)) - setting.y).square().squeeze(1)).mean(),
        setting.meta_loss,
        base_params=list(setting.net.parameters()),
        meta_params=[setting.weights],
        optimizer=setting.optimizer,
    )
    assert all(torch.equal(a, b) for a, b in zip(other.buffers(), before, strict=True)) and not out.degenerate


def test_modules_of_other_threads_are_left_alone() -> None:
    setting = Setting()
    other = nn.BatchNorm1d(5)

    def base() -> Tensor:
        thread = threading.Thread(target=lambda: other(setting.x))
        thread.start()
        thread.join()
        return setting.base_loss()

    setting.meta_grad(base_loss=base)
    assert other.num_batches_tracked >= 2


def test_a_buffer_that_is_replaced_comes_back_as_the_same_tensor() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + 1
            return x * (1 + 0.01 * self.count)

    setting = Setting()
    counter = Counter()
    original, values = counter.count, []

    def base() -> Tensor:
        losses = (setting.net(counter(setting.x)) - setting.y).square().squeeze(1)
        values.append(float(counter.count))
        return (setting.weights * losses).mean()

    setting.meta_grad(base_loss=base)
    assert counter.count is original and counter.count == 0 and set(values) == {1.0}


def test_theta_is_frozen_in_the_perturbed_passes_only() -> None:
    setting = Setting()
    flags: list[bool] = []

    def base() -> Tensor:
        flags.append(any(p.requires_grad for p in setting.net.parameters()))
        return setting.base_loss()

    def meta() -> Tensor:
        assert all(p.requires_grad for p in setting.net.parameters())
        return setting.meta_loss()

    setting.meta_grad(base_loss=base, meta_loss=meta)
    assert not any(flags) and all(p.requires_grad for p in setting.net.parameters())


def test_a_graph_made_before_the_meta_step_can_still_be_used() -> None:
    """theta is back to the bit, so autograd is told that nothing changed; after update_base it is told the truth."""
    setting = Setting(torch.float64)
    setting.net.eval()
    pending, again = setting.base_loss(), setting.base_loss()
    setting.meta_grad()
    grads = torch.autograd.grad(pending, setting.net[0].weight)  # type: ignore[union-attr]
    torch.testing.assert_close(grads, torch.autograd.grad(setting.base_loss(), setting.net[0].weight))  # type: ignore[union-attr]
    setting.meta_grad(update_base=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(again, setting.net[0].weight)  # type: ignore[union-attr]


def test_both_sides_are_realised_symmetrically_and_alpha_long() -> None:
    setting = Setting()
    theta = flat(tuple(setting.net.parameters()))
    seen: list[Tensor] = []

    def base() -> Tensor:
        seen.append(flat(tuple(setting.net.parameters())))
        return setting.base_loss()

    setting.meta_grad(base_loss=base, alpha=0.1, hold="center")
    plus, minus = seen[-2], seen[-1]
    assert relative_error((plus - theta).norm(), torch.tensor(0.1)) < 1e-5
    assert relative_error(plus - theta, theta - minus) < 1e-5


def test_one_extra_buffer_of_the_size_of_theta() -> None:
    """The peak of live tensor memory during a meta step is one theta above that of the largest single pass."""
    net = nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)])
    weights = torch.rand(4, requires_grad=True)
    x = torch.randn(4, 256)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        (weights * net(x).square().mean(1)).mean().backward()
        optimizer.step()
    size = sum(p.numel() for p in net.parameters()) * 4

    def meta_step() -> None:
        sk.meta_grad(
            lambda: (weights * net(x).square().mean(1)).mean(),
            lambda: net(x).square().mean(),
            base_params=net,
            meta_params=[weights],
            optimizer=optimizer,
            alpha=0.1,
            backend="cpu",
        )

    meta_step()
    assert size <= peak_bytes(meta_step, torch.device("cpu"))[0] < 1.02 * size
