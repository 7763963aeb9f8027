"""Small smooth bilevel problems and independent derivations that the tests hold the library against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sama_kernels as sk

OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (torch.optim.Adam, {"lr": 0.02}),
    (torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.1, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    (torch.optim.NAdam, {"lr": 0.02, "weight_decay": 0.1}),
    (torch.optim.RMSprop, {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.5, "centered": True, "eps": 1e-3}),
    (torch.optim.Adamax, {"lr": 0.02}),
    (torch.optim.ASGD, {"lr": 0.1, "lambd": 0.1}),
]


@dataclass
class Bilevel:
    """A base net, a weight net on its losses (held by stop_gradient), and the closures of both levels."""

    net: nn.Module
    weigher: nn.Module
    base_loss: Callable[[], Tensor]
    meta_loss: Callable[[], Tensor]

    @property
    def theta(self) -> tuple[Tensor, ...]:
        return tuple(self.net.parameters())

    @property
    def lam(self) -> tuple[Tensor, ...]:
        return tuple(self.weigher.parameters())

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        self.base_loss().backward()
        optimizer.step()
        self.weigher.zero_grad()  # the base backward reached lambda too; a training loop clears that before a meta step


def weight_net(
    seed: int, dtype: torch.dtype = torch.float64, hold: str = "stop_gradient", recorded: bool = True
) -> Bilevel:
    """Meta-Weight-Net regression. `hold`: what the weight net's input goes through, "stop_gradient" or "detach"."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    weigher = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1), nn.Sigmoid()).to(dtype)
    x, y, x_meta, y_meta = (torch.randn(24, k, dtype=dtype) for k in (5, 1, 5, 1))
    detached = sk.stop_gradient if hold == "stop_gradient" else torch.detach

    def base_loss() -> Tensor:
        losses = (net(x) - y).square()
        return (weigher(detached(losses)) * losses).mean()

    def meta_loss() -> Tensor:
        return (net(x_meta) - y_meta).square().mean()

    return Bilevel(net, weigher, sk.recorded(base_loss) if recorded else base_loss, meta_loss)


def mixed_derivative(problem: Bilevel, v: tuple[Tensor, ...]) -> Tensor:
    """-d/dlambda (g . v) with g = dL_base/dtheta, by exact double backward; flattened."""
    g = torch.autograd.grad(problem.base_loss(), problem.theta, create_graph=True)
    along_v = sum(((a * b).sum() for a, b in zip(g, v, strict=True)), torch.zeros((), dtype=g[0].dtype))
    return flat(torch.autograd.grad(-along_v, problem.lam))


def direct_gradient(problem: Bilevel) -> tuple[Tensor, ...]:
    return torch.autograd.grad(problem.meta_loss(), problem.theta)


def flat(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def snapshot(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN and signed zeros included."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool(torch.equal(a.detach().contiguous().view(integers), b.detach().contiguous().view(integers)))


def after_steps(problem: Bilevel, case: int, steps: int = 3) -> torch.optim.Optimizer:
    optimizer_type, options = OPTIMIZERS[case]
    optimizer = optimizer_type(problem.theta, **options)
    for _ in range(steps):
        problem.step(optimizer)
    return optimizer


def meta_grad(problem: Bilevel, optimizer: Any, **options: Any) -> sk.MetaGradient:
    return sk.meta_grad(
        problem.base_loss,
        problem.meta_loss,
        base_params=problem.net,
        meta_params=problem.weigher,
        optimizer=optimizer,
        **{"alpha": 1e-3, **options},
    )
