"""Meta training: the base level of one task, and meta steps on the initialisation that all tasks begin with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sama_kernels as sk

from ..common import processes
from .methods import Method, Settings
from .network import ConvNet
from .tasks import FewShotTask, draw_task


@dataclass(frozen=True)
class Problem:
    """What a run learns: the images of the classes for meta-training, the width of the network, K of K-shot."""

    images: Tensor
    width: int
    shots: int


class Learner:
    """The network of one task, theta, and the initialisation to be learned, lambda, which is as large as theta."""

    def __init__(self, width: int, method: Method, settings: Settings, seed: int, device: torch.device) -> None:
        torch.manual_seed(seed)
        self.method = method
        self.settings = settings
        self.net = ConvNet(width, settings.ways, settings.norm, settings.downsample).to(device)
        self.initialisation = sk.nn.ProximalTerm(self.net, settings.strength)

    def base_loss(self, task: FewShotTask) -> Tensor:
        """Cross-entropy on the support set, and the proximal term strength / 2 |theta - lambda|^2; 0-dim."""
        loss = F.cross_entropy(self.net(task.support), task.support_labels)
        return loss + self.initialisation(self.net) if self.method.proximal else loss

    def meta_loss(self, task: FewShotTask) -> Tensor:
        """Cross-entropy on the query set; 0-dim."""
        return F.cross_entropy(self.net(task.query), task.query_labels)

    def adapt(self, task: FewShotTask, steps: int) -> torch.optim.Optimizer:
        """The base level: theta <- lambda, then so many steps of a fresh optimizer on the support set."""
        self.initialisation.reset(self.net)
        optimizer = self._optimizer()
        parameters = list(self.net.parameters())
        for _ in range(steps):
            # lambda stands still here: no gradient for it
            for p, g in zip(parameters, torch.autograd.grad(self.base_loss(task), parameters), strict=True):
                p.grad = g
            optimizer.step()
        return optimizer

    def meta_gradient(self, task: FewShotTask) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """(gradient of the adapted network's meta loss in lambda, that loss, whether it is degenerate) of one task."""
        optimizer = self.adapt(task, self.settings.inner_steps)
        if self.method.algorithm is None:  # first-order MAML: d theta / d lambda = 1
            loss = self.meta_loss(task)
            return (
                torch.autograd.grad(loss, list(self.net.parameters())),
                loss.detach(),
                torch.zeros((), dtype=torch.bool),
            )
        # What does not read lambda can be left out of the perturbed passes: the support set then costs nothing there.
        # The Hessian needs all of it.
        out = sk.meta_grad(
            (lambda: self.base_loss(task)) if self.method.second_order else (lambda: self.initialisation(self.net)),
            lambda: self.meta_loss(task),
            base_params=self.net,
            meta_params=self.initialisation,
            optimizer=optimizer,
            alpha=self.settings.alpha,
            algorithm=self.method.algorithm(self.settings),
            sync="none",  # each process has tasks of its own
        )
        return out.grads, out.meta_loss, out.degenerate

    def _optimizer(self) -> torch.optim.Optimizer:
        lr = self.settings.inner_lr if self.method.learns else self.settings.scratch_lr
        if self.settings.inner_optimizer == "adam":
            return torch.optim.Adam(self.net.parameters(), lr=lr)
        return torch.optim.SGD(self.net.parameters(), lr=lr)


class MetaTrainer:
    """Meta steps: the meta gradient is averaged over the tasks of a meta batch, which several processes divide."""

    def __init__(self, problem: Problem, method: Method, settings: Settings, seed: int, device: torch.device) -> None:
        self.problem = problem
        self.settings = settings
        self.device = device
        self.learner = Learner(problem.width, method, settings, seed, device)
        self.meta_parameters = list(self.learner.initialisation.parameters())
        self.meta_optimizer = torch.optim.Adam(self.meta_parameters, lr=settings.meta_lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.meta_optimizer, self._rate)
        self.generator = torch.Generator().manual_seed(seed)  # every method and width sees the same tasks
        self.steps_done = 0
        self.losses: list[float] = []  # mean query loss of each meta step
        self.degenerate = 0

    def step(self) -> None:
        """One meta step."""
        settings = self.settings
        tasks = [self._draw() for _ in range(settings.meta_batch)]
        total = [torch.zeros_like(p) for p in self.meta_parameters]
        counts = torch.zeros(2, device=self.device)  # sum of the query losses, degenerate meta gradients
        for place, task in enumerate(tasks):
            if processes.is_mine(place):
                grads, loss, degenerate = self.learner.meta_gradient(task)
                torch._foreach_add_(total, list(grads))
                counts += torch.stack([loss, degenerate.to(loss)])
        for values in (*total, counts):
            processes.sum_in_place(values)
        for p, g in zip(self.meta_parameters, total, strict=True):
            p.grad = g / settings.meta_batch
        self.meta_optimizer.step()
        self.schedule.step()
        self.steps_done += 1
        self.losses.append(counts[0].item() / settings.meta_batch)
        self.degenerate += int(counts[1])

    def state(self) -> dict[str, Any]:
        """For a checkpoint: everything that the next step depends on."""
        return {
            "initialisation": self.learner.initialisation.state_dict(),
            "meta_optimizer": self.meta_optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "losses": self.losses,
            "degenerate": self.degenerate,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Back to what ``state`` gave."""
        self.learner.initialisation.load_state_dict(state["initialisation"])
        self.meta_optimizer.load_state_dict(state["meta_optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        self.losses = list(state["losses"])
        self.degenerate = state["degenerate"]
        self.steps_done = len(self.losses)

    def _rate(self, step: int) -> float:
        if self.settings.meta_schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * step / self.settings.meta_steps))

    def _draw(self) -> FewShotTask:
        s, shots = self.settings, self.problem.shots
        return draw_task(self.problem.images, s.ways, shots, s.queries or shots, self.generator, self.device)
