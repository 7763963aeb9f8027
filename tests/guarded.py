"""For the tests of what a meta step leaves alone: a net with all that could be changed, and Ctrl-C at every line."""

from __future__ import annotations

import random
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch
from problems import same_bits
from torch import Tensor, nn

import sama_kernels as sk
from sama_kernels import mask_draws

PACKAGE = re.escape(str(Path(sk.__file__).parent))
BACKENDS = ["cpu", "reference"]


class Setting:
    """A net with dropout and BatchNorm, a weight per sample, and everything that could be left changed."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 1)).to(
            dtype
        )
        self.weights = torch.rand(32, dtype=dtype, requires_grad=True)
        self.x, self.y = torch.randn(32, 5, dtype=dtype), torch.randn(32, 1, dtype=dtype)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.01)
        self.calls = 0
        for _ in range(3):
            self.optimizer.zero_grad()
            self.base_loss().backward()
            self.optimizer.step()
        self.weights.grad = None

    def base_loss(self) -> Tensor:
        self.calls += 1
        losses = (self.net(self.x) - self.y).square().squeeze(1)
        return (self.weights * torch.exp(-sk.stop_gradient(losses)) * losses).mean()

    def meta_loss(self) -> Tensor:
        return (self.net(self.x.flip(0)) - 1).square().mean() + 0 * random.random() * float(numpy.random.rand())

    def meta_grad(self, **options: Any) -> sk.MetaGradient:
        arguments: dict[str, Any] = {
            "base_params": self.net,
            "meta_params": [self.weights],
            "optimizer": self.optimizer,
            "alpha": 0.1,
        }
        return sk.meta_grad(
            options.pop("base_loss", self.base_loss),
            options.pop("meta_loss", self.meta_loss),
            **{**arguments, **options},
        )

    def state(self) -> dict[str, Any]:
        return {
            "tensors": [t.detach().clone() for t in (*self.net.parameters(), *self.net.buffers(), self.weights)],
            "identity": [id(t) for t in (*self.net.parameters(), *self.net.buffers())],
            "grads": [p.grad.clone() for p in self.net.parameters()],  # type: ignore[union-attr]
            "requires_grad": [p.requires_grad for p in (*self.net.parameters(), self.weights)],
            "lambda.grad": self.weights.grad,
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": str(numpy.random.get_state()),
            "handler": signal.getsignal(signal.SIGINT),
            "grad mode": torch.is_grad_enabled(),
            "stop_gradient": sk.stop_gradient(torch.ones(1)).tolist(),
            "hooks": len(nn.modules.module._global_forward_pre_hooks),
        }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, value in before.items():
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            assert all(same_bits(a, b) for a, b in zip(value, after[key], strict=True)), key
        elif isinstance(value, Tensor):
            assert torch.equal(value, after[key]), key
        else:
            assert value == after[key], key


class Broken(Exception):
    """Raised on purpose."""


class Explodes(torch.autograd.Function):
    """The identity, whose backward raises `Broken`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise Broken("in backward")


def interrupted_at_every_line(
    work: Callable[[], object], state: Callable[[], dict[str, Any]], files: str = PACKAGE
) -> int:
    """A real SIGINT at every line that `work` executes in these files (the first and the last time it does): each is a
    KeyboardInterrupt that leaves `state()` as it was. Returns how many lines there are."""
    before = state()
    executed: list[tuple[str, int]] = []

    def run(interrupt_at: int | None) -> None:
        del executed[:]

        def trace(frame: FrameType, event: str, _: object) -> Any:
            if not re.search(files, frame.f_code.co_filename):
                return None
            if event == "line":
                executed.append((frame.f_code.co_filename, frame.f_lineno))
                if len(executed) - 1 == interrupt_at:
                    signal.raise_signal(signal.SIGINT)
            return trace

        # A program that was started in the background ignores SIGINT, and Python leaves it at that.
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.settrace(trace)
        try:
            work()
        finally:
            sys.settrace(None)
            signal.signal(signal.SIGINT, previous)

    mask_draws._waiting.clear()
    with patch.object(mask_draws, "_LEFT_ALONE", 0):  # the same lines every time
        run(None)
        first = {place: i for i, place in reversed(list(enumerate(executed)))}
        last = {place: i for i, place in enumerate(executed)}
        for target in sorted({*first.values(), *last.values()}):
            with pytest.raises(KeyboardInterrupt):
                run(target)
            assert_same(before, state())
            assert torch._C._len_torch_dispatch_stack() == 0  # no mode of ours is left there
    return len(first)
