"""A whole run: meta training with checkpoints on the way, and accuracy on tasks of unseen classes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common import processes
from ..common.checkpoints import EVERY, Checkpoint
from .methods import Method, Settings
from .tasks import draw_task
from .training import Learner, MetaTrainer, Problem

TEST_SEED = 1_000_000  # so that the tasks of the test are no tasks of the training, whatever the seeds


@dataclass(frozen=True)
class Run:
    """What came of one method, width, number of shots and seed.

    Attributes:
        parameters: size of theta, and of lambda.
        accuracy: mean over the test tasks of the share of query images put into the right class.
        task_std: standard deviation of that share over the tasks.
        losses: mean query loss of each meta step; empty without meta learning.
        degenerate: tasks whose meta gradient was zero or not finite.
        seconds: of meta training; meta_steps of it in all.
    """

    method: str
    width: int
    shots: int
    seed: int
    parameters: int
    accuracy: float
    task_std: float
    losses: list[float]
    degenerate: int
    seconds: float


def run(
    problem: Problem,
    method: Method,
    settings: Settings,
    seed: int,
    test_images: Tensor,
    device: torch.device,
    checkpoint: Checkpoint,
    key: str,
    on_step: Callable[[], None],
) -> Run:
    """Meta-train one initialisation, from where the checkpoint has it, and score it; the clock is that of training."""
    trainer = MetaTrainer(problem, method, settings, seed, device)
    seconds = 0.0
    state = checkpoint.state(key)
    if state is not None:
        trainer.load_state(state["trainer"])
        seconds = state["seconds"]
    steps = settings.meta_steps if method.learns else 0
    for done in range(1, steps + 1):
        if done > trainer.steps_done:
            started = time.perf_counter()
            trainer.step()
            seconds += time.perf_counter() - started
            if done % EVERY == 0 and done < steps:
                checkpoint.save(key, {"trainer": trainer.state(), "seconds": seconds})
        on_step()
    accuracies = task_accuracies(trainer.learner, test_images, problem.shots, seed)
    return Run(
        method=method.key,
        width=problem.width,
        shots=problem.shots,
        seed=seed,
        parameters=sum(p.numel() for p in trainer.learner.net.parameters()),
        accuracy=accuracies.mean().item(),
        task_std=accuracies.std().item(),
        losses=[round(loss, 4) for loss in trainer.losses],
        degenerate=trainer.degenerate,
        seconds=seconds,
    )


def task_accuracies(learner: Learner, images: Tensor, shots: int, seed: int) -> Tensor:
    """float32 [test_tasks], on the CPU: share of the query images put into the right class, task by task.

    The tasks depend on the seed alone: all methods and widths are scored on the same. Several processes divide them.
    """
    settings, method = learner.settings, learner.method
    generator = torch.Generator().manual_seed(TEST_SEED + seed)
    device = next(learner.net.parameters()).device
    found = torch.zeros(settings.test_tasks)
    for place in range(settings.test_tasks):
        task = draw_task(images, settings.ways, shots, settings.test_queries, generator, device)
        if processes.is_mine(place):
            learner.adapt(task, settings.scratch_steps if method.longer else settings.inner_steps)
            with torch.no_grad():
                right = learner.net(task.query).argmax(dim=1) == task.query_labels
            found[place] = right.float().mean()
    processes.sum_in_place(found)
    return found


def nearest_mean_accuracy(images: Tensor, settings: Settings, shots: int, seed: int) -> float:
    """Without any network, on the same tasks: the class whose support images' mean is nearest, pixel by pixel.

    With one shot that is the nearest neighbour.
    """
    generator = torch.Generator().manual_seed(TEST_SEED + seed)
    right = 0.0
    for _ in range(settings.test_tasks):
        task = draw_task(images, settings.ways, shots, settings.test_queries, generator, torch.device("cpu"))
        means = task.support.flatten(1).view(settings.ways, shots, -1).mean(dim=1)
        nearest = torch.cdist(task.query.flatten(1), means).argmin(dim=1)
        right += (nearest == task.query_labels).double().mean().item()
    return right / settings.test_tasks
