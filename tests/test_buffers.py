"""Buffers of all kinds are what they were after a meta step, and the same in each of its passes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import relative_error, same_bits
from ranks import run_ranks
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

import sama_kernels as sk
from sama_kernels.buffers import BufferGuard


class Regression:
    """Weighted regression by a model with batch normalization; `predict` says how it is called."""

    def __init__(self, seed: int, model: nn.Module | None = None) -> None:
        torch.manual_seed(seed)
        self.model = model or nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)).double()
        self.x, self.y = torch.randn(12, 4, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
        self.lam = torch.randn(12, dtype=torch.float64, requires_grad=True)
        self.predict: Callable[[], Tensor] = lambda: self.model(self.x)
        self.theta = list(self.model.parameters())

    def base_loss(self) -> Tensor:
        return (self.lam.sigmoid() * (self.predict().squeeze(1) - self.y).square()).mean()

    def meta_loss(self) -> Tensor:
        return (self.predict().squeeze(1) - self.y.flip(0)).square().mean()

    def trained(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.theta, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            self.base_loss().backward()
            optimizer.step()
        return optimizer

    def meta_grad(self, optimizer: torch.optim.Optimizer, **options: Any) -> Tensor:
        arguments = {"base_params": self.theta, "alpha": 1e-3, **options}
        out = sk.meta_grad(self.base_loss, self.meta_loss, meta_params=[self.lam], optimizer=optimizer, **arguments)
        assert out.grads[0].norm() > 0
        return out.grads[0]


@pytest.mark.parametrize("difference", ["central", "forward", "exact"])
@pytest.mark.parametrize("given", ["module", "list"])
def test_buffers_of_one_functional_call(given: str, difference: str) -> None:
    """A task's own statistics, with which the model is called; the model keeps its own."""
    problem = Regression(1)
    params = dict(problem.model.named_parameters())
    statistics = {name: b + 1 for name, b in problem.model.named_buffers()}
    problem.predict = lambda: functional_call(problem.model, (params, statistics), problem.x)
    optimizer = problem.trained()
    tensors = [*problem.model.buffers(), *statistics.values()]
    before, versions = [b.clone() for b in tensors], [b._version for b in tensors]
    theta: Any = problem.model if given == "module" else problem.theta
    problem.meta_grad(optimizer, base_params=theta, difference=difference)
    assert all(a is b for a, b in zip(tensors, problem.model.buffers(), strict=False))
    assert all(map(same_bits, tensors, before)) and versions == [b._version for b in tensors]


def test_buffers_stacked_for_vmap() -> None:
    """An ensemble that updates its statistics: the stacked ones come back; the gradient is that of separate models."""
    problem = Regression(2)
    models = [Regression(seed).model for seed in (3, 4)]
    params, buffers = stack_module_state(models)
    skeleton = models[0]
    problem.theta = list(params.values())

    def predict() -> Tensor:
        one = lambda p, b: functional_call(skeleton, (p, b), (problem.x,))  # noqa: E731
        return torch.vmap(one)(params, buffers).mean(0)

    problem.predict = predict
    optimizer = problem.trained()
    before = [b.clone() for b in (*buffers.values(), *skeleton.buffers())]
    found = problem.meta_grad(optimizer)
    assert all(map(same_bits, (*buffers.values(), *skeleton.buffers()), before))
    with torch.no_grad():
        for i, model in enumerate(models):
            for name, p in model.named_parameters():
                p.copy_(params[name][i])
    problem.theta = [p for model in models for p in model.parameters()]
    problem.predict = lambda: torch.stack([model(problem.x) for model in models]).mean(0)
    separate = problem.meta_grad(torch.optim.SGD(problem.theta, lr=0.1), adaptation="none")
    assert relative_error(found, separate * 0.1) < 1e-9


@pytest.mark.parametrize("how", ["forward", "script", "function"])
def test_statistics_of_modules_whose_call_no_hook_sees(how: str) -> None:
    problem = Regression(5)
    first, norm, tanh, last = problem.model
    if how == "forward":
        problem.predict = lambda: last(tanh(norm.forward(first(problem.x))))
    elif how == "script":
        scripted = torch.jit.script(problem.model)
        problem.predict = lambda: scripted(problem.x)
    else:
        mean, variance = norm.running_mean, norm.running_var
        problem.predict = lambda: last(tanh(F.batch_norm(first(problem.x), mean, variance, training=True)))
    optimizer = problem.trained()
    before = [b.clone() for b in problem.model.buffers()]
    problem.meta_grad(optimizer)
    assert all(map(same_bits, problem.model.buffers(), before))


class Scaled(nn.Module):
    """A linear layer whose inputs are scaled by a buffer; if that is None, forward makes it."""

    def __init__(self, scale: Tensor | None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1, dtype=torch.float64)
        self.register_buffer("scale", scale)
        self.calls: list[bool] = []
        self.inner = nn.Identity()  # without buffers

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(self.scale is None)
        if self.scale is None:
            self.scale = (x @ self.layer.weight.detach().T).mean().reshape(1, 1)
            self.register_buffer("made", x.mean(0))
            self.inner.register_buffer("made", x.mean(0))
        return self.layer(x * self.scale)


@pytest.mark.parametrize("inference", [False, True])
def test_buffers_that_cannot_be_written_as_they_are(inference: bool) -> None:
    with torch.inference_mode() if inference else nullcontext():
        scale = torch.rand(1, 4, dtype=torch.float64).expand(12, 4)
        scale = scale.clone() if inference else scale
    values = scale.clone()
    problem = Regression(6, Scaled(scale))
    problem.meta_grad(problem.trained(), base_params=problem.model)
    assert problem.model.scale is scale and same_bits(scale.clone(), values)


def test_expanded_buffers_come_back() -> None:
    storage = torch.arange(6.0).reshape(2, 3)
    module = nn.Module()
    module.register_buffer("wide", storage[:, None].expand(2, 4, 3))
    module.register_buffer("empty", torch.zeros(0, 3).expand(0, 3))
    before = storage.clone()
    with BufferGuard([module], []) as guard:
        assert len(guard._saved) == 2
        storage.mul_(3)
    assert same_bits(storage, before)


def test_a_buffer_that_forward_makes_is_made_in_each_pass_and_gone_afterwards() -> None:
    problem = Regression(7, Scaled(None))
    optimizer = problem.trained()
    problem.model.scale = None
    del problem.model._buffers["made"], problem.model.inner._buffers["made"]
    problem.model.calls.clear()
    problem.meta_grad(optimizer, base_params=problem.model)
    assert problem.model.scale is None and list(problem.model._buffers) == ["scale"]
    assert not problem.model.inner._buffers
    assert len(problem.model.calls) == 3 and all(problem.model.calls)


def test_a_buffer_in_the_memory_of_a_base_parameter_moves_with_it() -> None:
    """Bringing it back before each pass would bring theta back, and the difference would be 0."""
    problem = Regression(8)
    optimizer = problem.trained()
    theta = [p.detach().clone() for p in problem.theta]
    expected = problem.meta_grad(optimizer)
    first = problem.model[0]
    first.register_buffer("same", first.weight.data)
    first.register_buffer("row", first.weight.data[2:3, ::2])
    first.register_buffer("beside", torch.rand(3, dtype=torch.float64))
    found = problem.meta_grad(optimizer, base_params=problem.model)
    assert same_bits(found, expected) and all(map(same_bits, problem.theta, theta))


def test_what_memory_is_shared() -> None:
    whole = torch.zeros(10)
    guard = BufferGuard([], [whole[2:4], whole[6:9], torch.zeros(0)])
    inside = [whole, whole[3:5], whole[8:], whole[1:3], whole[2:3], whole[::7][1:]]
    outside = [whole[:2], whole[4:6], whole[9:], whole[4:4], torch.zeros(4), torch.zeros(3, dtype=torch.int64)]
    assert all(x in guard._theta for x in inside) and not any(x in guard._theta for x in outside)


class Bank(nn.Module):
    """Keeps what it is given, in a method that is no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(3, dtype=torch.float64))
        self.seen: list[float] = []

    def push(self, x: Tensor) -> Tensor:
        self.seen.append(float(self.kept.sum()))
        self.kept.add_(x.detach())
        return self.kept.clone()


def test_buffers_that_are_written_by_a_method() -> None:
    """Each pass sees the bank of before the meta step, and so does what comes after it."""
    problem = Regression(9)
    bank = Bank()
    problem.predict = lambda: problem.model(problem.x) * (1 + bank.push(torch.ones(3, dtype=torch.float64)).sum())
    optimizer = problem.trained()
    before = bank.kept.clone()
    bank.seen.clear()
    problem.meta_grad(optimizer)
    assert same_bits(bank.kept, before) and bank.seen == [float(before.sum())] * 3


@pytest.mark.parametrize("both", [False, True])
def test_modules_that_another_thread_runs_are_left_to_it(both: bool) -> None:
    """Unless this one runs them too."""
    module = nn.BatchNorm1d(3)
    with BufferGuard([module], []) as guard:
        thread = threading.Thread(target=lambda: module(torch.randn(4, 3)))
        thread.start()
        thread.join()
        if both:
            module(torch.randn(4, 3))
        guard.restore()
        assert module.num_batches_tracked == (0 if both else 1)
    assert module.num_batches_tracked == (0 if both else 1)


KINDS: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.rand(2), torch.rand(3)], layout=torch.jagged),
    "complex": lambda: torch.rand(2, dtype=torch.complex64),
    "conjugated": lambda: torch.rand(2, dtype=torch.complex64).conj(),
    "float8": lambda: torch.rand(4).to(torch.float8_e4m3fn),
    "16 bits": lambda: torch.ones(2, dtype=torch.uint16),
    "no elements": lambda: torch.ones(0, 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_of_other_kinds(kind: str) -> None:
    module = nn.BatchNorm1d(2)
    module.register_buffer("other", KINDS[kind]())
    module.register_buffer("nowhere", torch.empty(3, device="meta"))
    module.register_buffer("lazy", nn.parameter.UninitializedBuffer())
    buffer: Any = module.other
    values = buffer.values() if kind in ("nested", "compressed") else buffer.to_dense() if kind == "sparse" else buffer
    before = values.clone()
    with BufferGuard([module], list(module.parameters())):
        module(torch.randn(5, 2))
        (buffer.values() if kind == "compressed" else buffer).zero_()
    after = buffer.values() if kind in ("nested", "compressed") else buffer.to_dense() if kind == "sparse" else buffer
    assert module.other is buffer and torch.equal(after, before) and module.num_batches_tracked == 0


def _statistics_on_a_mesh(rank: int, world: int) -> bool:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, distribute_module

    module = distribute_module(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), init_device_mesh("cpu", (world,)))
    norm: Any = module[0]
    with BufferGuard([module, *module], list(module.parameters())):
        norm.running_mean.add_(1)
    return isinstance(norm.running_mean, DTensor) and not norm.running_mean.to_local().any()


def test_buffers_that_are_distributed() -> None:
    assert run_ranks(1, _statistics_on_a_mesh) == [True]
