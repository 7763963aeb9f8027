"""The optimizers of accelerate, Lightning and Fabric are opened by name; another wrapper is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sama_kernels as sk


class Problem:
    """Reweighting of a small regression, after `steps` base steps by the loop of a framework."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.weights = nn.Parameter(torch.randn(8))
        self.x, self.y = torch.randn(8, 3), torch.randn(8, 1)

    def base_loss(self) -> Tensor:
        return (self.weights.sigmoid()[:, None] * (self.model(self.x) - self.y).square()).mean()

    def meta_loss(self) -> Tensor:
        return (self.model(self.x) + self.y).square().mean()

    def meta_grad(self, optimizer: Any, **kwargs: Any) -> sk.MetaGradient:
        return sk.meta_grad(
            self.base_loss, self.meta_loss, base_params=self.model, meta_params=[self.weights], optimizer=optimizer,
            alpha=0.01, **kwargs,
        )  # fmt: skip


def plain(steps: int) -> sk.MetaGradient:
    problem = Problem()
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        problem.base_loss().backward()
        optimizer.step()
    return problem.meta_grad(optimizer)


def same(a: sk.MetaGradient, b: sk.MetaGradient) -> bool:
    return bool(a.norm > 0) and a.norm.equal(b.norm) and a.grads[0].equal(b.grads[0])


def test_lightning(tmp_path: Path) -> None:
    """Manual optimization: the meta step in training_step, with the optimizer that Lightning hands out."""
    lightning = pytest.importorskip("pytorch_lightning")
    found: list[sk.MetaGradient] = []

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.problem = Problem()
            self.model = self.problem.model

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.model.parameters(), lr=0.01)

        def training_step(self, _: Any) -> None:
            optimizer = self.optimizers()
            assert type(optimizer).__name__ == "LightningAdamW"
            optimizer.zero_grad()
            self.manual_backward(self.problem.base_loss())
            optimizer.step()
            found.append(self.problem.meta_grad(optimizer))
            assert same(found[-1], self.problem.meta_grad(optimizer.optimizer)) or len(found) == 1
            assert sk.state_dict(optimizer) == sk.state_dict(optimizer.optimizer)
            assert sk.diagnose(
                self.problem.base_loss, self.problem.meta_loss, base_params=self.model,
                meta_params=[self.problem.weights], optimizer=optimizer, alpha=0.01,
            ).norm == pytest.approx(float(found[-1].norm))  # fmt: skip

    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.zeros(3, 1)))
    assert len(found) == 3 and same(found[-1], plain(3))


def test_fabric() -> None:
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu")
    problem = Problem()
    problem.model, optimizer = fabric.setup(problem.model, torch.optim.AdamW(problem.model.parameters(), lr=0.01))
    for _ in range(3):
        optimizer.zero_grad()
        fabric.backward(problem.base_loss())
        optimizer.step()
    assert type(optimizer).__name__ == "FabricAdamW"
    assert same(problem.meta_grad(optimizer), plain(3))


class Scaled(torch.amp.GradScaler):
    """As accelerate makes one on a GPU."""

    def __init__(self) -> None:
        super().__init__("cpu", init_scale=2.0**8)


def test_accelerate_brings_its_scaler() -> None:
    """The passes are scaled by the scaler with which the wrapper makes its steps; another one is an error."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    problem, scaler = Problem(), Scaled()
    inner = torch.optim.AdamW(problem.model.parameters(), lr=0.01)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=scaler)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(problem.base_loss()).backward()
        optimizer.step()
    asked: list[float] = []

    def meta_loss() -> Tensor:
        loss = (problem.model(problem.x) + problem.y).square().mean()
        loss.register_hook(lambda g: asked.append(float(g)))
        return loss

    problem.meta_loss = meta_loss  # type: ignore[method-assign]
    out = problem.meta_grad(optimizer)
    assert asked == [2.0**8] and same(out, problem.meta_grad(inner, grad_scaler=scaler))
    torch.testing.assert_close(out.grads[0], plain(3).grads[0], rtol=1e-4, atol=1e-8)
    with pytest.raises(ValueError, match="grad_scaler: AcceleratedOptimizer makes its steps with another scaler"):
        problem.meta_grad(optimizer, grad_scaler=Scaled())


def test_another_wrapper_is_an_error() -> None:
    """It may change what a step is (Lookahead, SAM)."""

    class Lookahead(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups

    problem = Problem()
    with pytest.raises(TypeError, match=r"optimizer: a Lookahead is a wrapper.*\.optimizer"):
        problem.meta_grad(Lookahead(torch.optim.SGD(problem.model.parameters(), lr=0.1)))
