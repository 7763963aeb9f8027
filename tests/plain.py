"""A bilevel problem without held values, for the algorithms that differentiate the base gradient itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import sama_kernels as sk


class Plain:
    """Weighted regression without held values: all its derivatives are autograd's."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)
        self.lam = torch.randn(12, dtype=dtype, requires_grad=True)
        self.x, self.y, self.x_meta = (torch.randn(12, k, dtype=dtype) for k in (4, 1, 4))

    def base_loss(self) -> Tensor:
        return (self.lam.sigmoid()[:, None] * (self.net(self.x) - self.y).square()).mean()

    def meta_loss(self) -> Tensor:
        return (self.net(self.x_meta) - 1).square().mean()

    @property
    def theta(self) -> list[nn.Parameter]:
        return list(self.net.parameters())

    def trained(self, case: tuple[Any, dict[str, Any]], max_norm: float | None = None) -> tuple[Any, Tensor | None]:
        """An optimizer after three steps, and the factor of the last one's clipping."""
        optimizer, coef = case[0](self.theta, **case[1]), None
        for _ in range(3):
            optimizer.zero_grad()
            self.base_loss().backward()
            if max_norm is not None:
                coef = sk.clip_coef(clip_grad_norm_(self.theta, max_norm), max_norm)
            optimizer.step()
        self.lam.grad = None
        return optimizer, coef

    def grad(self, optimizer: Any, algorithm: Any, **options: Any) -> Tensor:
        return self.meta_step(optimizer, algorithm, **options).grads[0]

    def meta_step(self, optimizer: Any, algorithm: Any, **options: Any) -> sk.MetaGradient:
        return sk.meta_grad(
            options.pop("base_loss", self.base_loss), options.pop("meta_loss", self.meta_loss), base_params=self.net,
            meta_params=[self.lam], optimizer=optimizer, algorithm=algorithm, **{"alpha": 1e-4, **options},
        )  # fmt: skip
