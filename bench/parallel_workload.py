"""The BERT of bench/meta_step.py, over several ranks: in DistributedDataParallel, or sharded by `fully_shard`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sama_kernels as sk
from bench.meta_step import Workload
from sama_kernels.distributed import sharded

MODES = ("ddp", "fsdp2")
LAMBDAS = ("small", "large")
SYNCS = ("none", "final", "full")
AFTERWARDS = "none, then all_reduce"


@dataclass(frozen=True)
class Size:
    """What every rank works on: sequences per batch, tokens per sequence; and the buckets of gradients."""

    model: str
    batch: int
    tokens: int
    bucket_mib: float


class Gated(nn.Module):
    """A linear layer whose weights (theta) each have a factor (lambda): y = (W * gate) x + b."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.gate = nn.Parameter(torch.ones_like(linear.weight), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight * self.gate, self.bias)


class ParallelWorkload(Workload):
    """The same weights on all ranks, batches of its own on each.

    `lam`: "small": the Meta-Weight-Net on the losses, which is replicated; "large": a factor on every weight of the
    encoder, inside the model, and sharded with it under "fsdp2", so that every pass is a whole backward pass.
    """

    def __init__(self, size: Size, mode: str, lam: str, rank: int, device: torch.device) -> None:
        super().__init__(size.model, size.batch, size.tokens, device)
        self.large, self.bucket_mib = lam == "large", size.bucket_mib
        torch.manual_seed(1 + rank)
        self.ids = torch.randint_like(self.ids, 5, self.net.config.vocab_size)
        self.labels = torch.randint_like(self.labels, 0, 2)
        inner = self.net
        layers = inner.bert.encoder.layer
        if self.large:
            for module in [m for m in layers.modules() if not isinstance(m, nn.Linear)]:
                for name, child in module.named_children():
                    if isinstance(child, nn.Linear):
                        setattr(module, name, Gated(child))
        if mode == "ddp":
            self.net = DistributedDataParallel(inner, bucket_cap_mb=size.bucket_mib, gradient_as_bucket_view=True)
        else:
            for layer in layers:
                fully_shard(layer)
            fully_shard(inner)
        gates = [m.gate for m in layers.modules() if isinstance(m, Gated)]
        self.theta = [p for p in inner.parameters() if p.requires_grad]
        self.lam: list[Any] = gates if self.large else list(self.weigher.parameters())
        self.optimizer = torch.optim.Adam(self.theta, lr=1e-5)

    def base_loss(self) -> Tensor:
        """Of the base batch; lambda is inside the model if it is large."""
        return self.losses(0).mean() if self.large else super().base_loss()

    def meta_step(self, sync: str = "final", **options: Any) -> sk.MetaGradient:  # type: ignore[override]
        """One SAMA meta gradient; a large lambda requires grad here only, so that base steps spare its gradient."""
        with self._learning():
            return sk.meta_grad(
                self.recorded_base_loss, self.meta_loss, base_params=self.theta, meta_params=self.lam,
                optimizer=self.optimizer, sync=sync, bucket_mib=self.bucket_mib, **options,
            )  # fmt: skip

    @contextmanager
    def _learning(self) -> Iterator[None]:
        for p in self.lam if self.large else ():
            p.requires_grad_(True)
        try:
            yield
        finally:
            for p in self.lam if self.large else ():
                p.requires_grad_(False)

    def meta_step_then_all_reduce(self) -> list[Tensor]:
        """What one would write without `sync`: the averages of the meta gradients, after all passes, in one piece."""
        grads = self.meta_step("none").grads
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([g.numel() for g in grads])
        return [part.view_as(g) for part, g in zip(parts, grads, strict=True)]

    def candidates(self, world: int) -> dict[tuple[str, str | None], Callable[[], object]]:
        """(base or meta step, sync) -> the step; alone, nothing is synchronised."""
        steps: dict[tuple[str, str | None], Callable[[], object]] = {("base", None): self.plain_step}
        for sync in SYNCS if world > 1 else SYNCS[:1]:
            steps["meta", sync] = partial(self.meta_step, sync)
        if world > 1 and not any(sharded.is_sharded(p) for p in self.lam):  # FSDP averages those in its passes
            steps["meta", AFTERWARDS] = self.meta_step_then_all_reduce
        return steps

    def elements(self) -> dict[str, int]:
        """Of theta and lambda, over all ranks."""
        return {f"{name}_elements": sum(p.numel() for p in params) for name, params in
                (("theta", self.theta), ("lambda", self.lam))}  # fmt: skip

    def resident_bytes(self) -> int:
        """Parameters, buffers, gradients and optimizer state that lie on this rank between steps."""
        state = [x for state in self.optimizer.state.values() for x in state.values()]
        grads = [p.grad for p in self.theta if p.grad is not None]
        tensors = [*self.theta, *self.lam, *self.net.buffers(), *grads, *state]
        return sum(x.numel() * x.element_size() for x in map(sharded.local, tensors))
