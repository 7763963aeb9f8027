"""A small bilevel problem whose batches can be divided over ranks, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from problems import OPTIMIZERS
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import sama_kernels as sk

BASE_ROWS, META_ROWS = 24, 12


def portion(rows: int, rank: int, world: int, unequal: bool) -> slice:
    """The rows of a rank; unequal: the first ones get fewer."""
    edges = [
        rows * (r * (r + 1) if unequal else r) // (world * (world + 1) if unequal else world) for r in range(world + 1)
    ]
    return slice(edges[rank], edges[rank + 1])


class Divided:
    """Meta-Weight-Net on this rank's rows, or on all."""

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        *,
        unequal: bool = False,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
        self.weigher = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1), nn.Sigmoid()).to(dtype)
        self.everything = (torch.randn(BASE_ROWS, 5, dtype=dtype), torch.randn(BASE_ROWS, 1, dtype=dtype))
        meta = (torch.randn(META_ROWS, 5, dtype=dtype), torch.randn(META_ROWS, 1, dtype=dtype))
        base_rows = portion(BASE_ROWS, rank, world, unequal)
        meta_rows = portion(META_ROWS, rank, world, unequal)
        self.base = tuple(x[base_rows] for x in self.everything)
        self.meta = tuple(x[meta_rows] for x in meta)
        self.net.to(device)
        self.weigher.to(device)
        self.everything = tuple(x.to(device) for x in self.everything)
        self.base, self.meta = (tuple(x.to(device) for x in part) for part in (self.base, self.meta))
        self.weight = (float(len(self.base[0])), float(len(self.meta[0])))
        self.explicit = False
        self.of_losses = True  # the weights; else of the targets, so that nothing has to be held

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        losses = (self.net(x) - y).square()
        return (self.weigher(sk.stop_gradient(losses) if self.of_losses else y) * losses).mean()

    def base_loss(self) -> Tensor:
        return self.loss(*self.base)

    def microbatches(self) -> list[Callable[[], Tensor]]:
        """Two whose losses sum to `base_loss`."""
        x, y = self.base
        half, rows = len(x) // 2, len(x)
        return [
            lambda: self.loss(x[:half], y[:half]) * (half / rows),
            lambda: self.loss(x[half:], y[half:]) * ((rows - half) / rows),
        ]

    def meta_loss(self) -> Tensor:
        x, y = self.meta
        loss = (self.net(x) - y).square().mean()
        if self.explicit:
            loss = loss + (self.weigher(x[:, :1])).mean()
        return loss

    def train(
        self, optimizer: torch.optim.Optimizer, steps: int = 3, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """On all rows, whatever this rank's are, so that every rank has the same optimizer state."""
        scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        for _ in range(steps):
            optimizer.zero_grad()
            scaler.scale(self.loss(*self.everything)).backward()
            scaler.step(optimizer)
            scaler.update()
        self.weigher.zero_grad()

    def optimizer(self, case: int) -> torch.optim.Optimizer:
        optimizer_type, options = OPTIMIZERS[case]
        return optimizer_type(self.net.parameters(), **options)

    def meta_grad(self, optimizer: Any, *, microbatches: bool = False, **options: Any) -> sk.MetaGradient:
        return sk.meta_grad(
            self.microbatches() if microbatches else self.base_loss,
            self.meta_loss,
            base_params=self.net,
            meta_params=self.weigher,
            optimizer=optimizer,
            **{"alpha": 0.1, **options},
        )


def sharded_after_a_step(rank: int, world: int) -> tuple[Divided, torch.optim.Optimizer]:
    """theta and lambda by FSDP."""
    problem = Divided(rank, world)
    fully_shard(problem.net)
    fully_shard(problem.weigher)
    optimizer = problem.optimizer(2)
    problem.base_loss().backward()
    optimizer.step()
    return problem, optimizer


def bits_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]
