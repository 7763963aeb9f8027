"""Meta steps under autocast against float32, and 16-bit meta parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_cases import SEED
from problems import relative_error
from torch import Tensor, nn
from torch.amp import GradScaler

import sama_kernels as sk


@pytest.fixture(autouse=True)
def fresh_inputs() -> Iterator[None]:
    """Other random inputs in every run; pytest shows the printed line when a test fails."""
    print(f"repeat with SAMA_TEST_SEED={SEED}")
    torch.manual_seed(SEED)
    yield


class SoftPrompt:
    """lambda is a prompt of a small model, so its gradient passes through everything that autocast casts."""

    def __init__(self) -> None:
        self.net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
        self.prompt = (0.3 * torch.randn(16)).requires_grad_()
        self.x, self.y = torch.randn(256, 16), torch.randint(4, (256,))
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.5, momentum=0.9)
        self.dtype: torch.dtype | None = None

    def loss(self, prompt: Tensor, size: float = 1.0) -> Tensor:
        with torch.autocast("cpu", dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            logits = self.net(torch.cat([self.x, prompt.expand(256, 16)], dim=1))
            return size * nn.functional.cross_entropy(logits.float(), self.y)

    def meta_grad(self, size: float, **options: Any) -> sk.MetaGradient:
        return sk.meta_grad(
            lambda: self.loss(self.prompt, size), lambda: self.loss(torch.ones(16), size), base_params=self.net,
            meta_params=[self.prompt], optimizer=self.optimizer, alpha=2.0, **options,
        )  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.05), (torch.bfloat16, 0.3)], ids=str)
def test_autocast_against_float32(dtype: torch.dtype, tolerance: float) -> None:
    problem = SoftPrompt()
    scaler = GradScaler("cpu", init_scale=2.0**12)
    problem.dtype = dtype
    for _ in range(20):
        problem.optimizer.zero_grad()
        scaler.scale(problem.loss(problem.prompt)).backward()
        scaler.step(problem.optimizer)
        scaler.update()
    mixed = problem.meta_grad(1.0, grad_scaler=scaler)
    tiny, lost = problem.meta_grad(1e-8, grad_scaler=GradScaler("cpu", init_scale=2.0**36)), problem.meta_grad(1e-8)
    problem.dtype = None
    exact = problem.meta_grad(1.0)
    assert not mixed.degenerate and relative_error(mixed.grads[0], exact.grads[0]) < tolerance
    assert relative_error(mixed.norm, exact.norm) < tolerance
    # Losses of 1e-8: float16 gradients are nothing without a scale, and as good as ever with one (bfloat16's always).
    assert relative_error(tiny.grads[0] * 1e16, exact.grads[0]) < tolerance
    if dtype == torch.float16:
        assert not relative_error(lost.grads[0] * 1e16, exact.grads[0]) < 0.9


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_lambda_is_differenced_in_float32(dtype: torch.dtype, scaled: bool, microbatches: int) -> None:
    """The two gradients come in lambda's dtype, here rounded to it; their difference quotient is the float64 one of
    these two, rounded once. Several microbatches are added up in float32."""
    p = torch.ones(1, dtype=torch.float64, requires_grad=True)
    lam = torch.zeros(100, dtype=dtype, requires_grad=True)
    a = torch.rand(microbatches, 100, dtype=torch.float64) + 1
    scaler = GradScaler("cpu", init_scale=1024.0) if scaled else None
    out = sk.meta_grad(
        [lambda k=k: (lam * (a[k] * p)).sum() for k in range(microbatches)], lambda: p.sum(), base_params=[p],
        meta_params=[lam], optimizer=None, adaptation="none", alpha=0.1, grad_scaler=scaler,
    )  # fmt: skip
    plus, minus = ((a * x).to(dtype).double().sum(dim=0) for x in (1.1, 0.9))
    assert out.grads[0].dtype == dtype
    quotient = -(plus - minus) / 0.2
    torch.testing.assert_close(out.grads[0].double(), quotient, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=0)
