"""A whole run: the training loop with its clock, accuracy on the way and at the end, and the learned weights."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..common import processes
from ..common.checkpoints import EVERY, Checkpoint
from ..common.encoder import EncodedTexts, TextClassifier
from .methods import Method, Settings
from .training import MetaLearners, Task, Trainer

CURVE_TEXTS = 300  # texts that a point of the accuracy curve is measured on
WEIGHT_SAMPLES = 1000  # weakly labelled texts whose learned weights are kept for the picture


@dataclass(frozen=True)
class SampleWeights:
    """What the meta learners make of some texts with a weak label after a run; each [K], on the CPU."""

    losses: Tensor
    weights: Tensor
    weak_label_right: Tensor
    used_label_right: Tensor


@dataclass(frozen=True)
class Run:
    """What came of one method and seed."""

    method: str
    seed: int
    accuracy: float
    curve: list[tuple[int, float]]
    steps: int
    seconds: float
    samples_per_second: float
    base_norm: float
    degenerate_meta_steps: int
    weights: SampleWeights | None

    @classmethod
    def of(cls, kept: dict[str, Any]) -> Run:
        """From its ``asdict``."""
        weights = kept["weights"]
        curve = [(step, score) for step, score in kept["curve"]]
        return cls(**{**kept, "curve": curve, "weights": None if weights is None else SampleWeights(**weights)})


@torch.no_grad()
def accuracy(model: TextClassifier, texts: EncodedTexts, labels: Tensor, index: Tensor) -> float:
    """Share of the texts ``index`` that the model, without dropout, puts into the right class.

    Several processes, whose models are the same, divide the texts.
    """
    model.eval()
    by_length = index[texts.lengths[index].argsort()]
    right = 0
    for place, rows in enumerate(torch.split(by_length, 128)):
        if processes.is_mine(place):
            right += int((model(texts.batch(rows)).argmax(dim=1) == labels[rows]).sum())
    model.train()
    return processes.total(right) / len(index)


def run(
    task: Task, method: Method, settings: Settings, seed: int, on_step: Callable[[], None], checkpoint: Checkpoint
) -> Run:
    """Train one fresh classifier and score it; the clock runs during the training steps only.

    What the checkpoint has of this run is not done again.
    """
    key = f"{method.key}, seed {seed}"
    if (finished := checkpoint.result(key)) is not None:
        return Run.of(finished)
    trainer = Trainer(task, method, settings, seed)
    curve: list[tuple[int, float]] = []
    curve_steps = {round(trainer.steps * i / settings.curve_points) for i in range(1, settings.curve_points)}
    times: list[float] = []
    if (state := checkpoint.state(key)) is not None:
        trainer.load(state["trainer"])
        curve, times = [(step, score) for step, score in state["curve"]], state["times"]
        for _ in times:
            on_step()
    for step in range(trainer.step_count + 1, trainer.steps + 1):
        started = _now(task)
        trainer.step()
        times.append(_now(task) - started)
        on_step()
        if step in curve_steps:
            curve.append(
                (step, accuracy(trainer.model, task.scored, task.scored_labels, task.scored_index[:CURVE_TEXTS]))
            )
        if step % EVERY == 0 and step < trainer.steps:
            checkpoint.save(key, {"trainer": trainer.state(), "curve": curve, "times": times})
    final = accuracy(trainer.model, task.scored, task.scored_labels, task.scored_index)
    found = Run(
        method=method.key,
        seed=seed,
        accuracy=final,
        curve=[*curve, (trainer.steps, final)],
        steps=trainer.steps,
        seconds=sum(times),
        samples_per_second=settings.batch_size / typical_step_seconds(times, settings),
        base_norm=math.sqrt(sum(float(p.detach().double().pow(2).sum()) for p in trainer.model.parameters())),
        degenerate_meta_steps=sum(bool(flag) for flag in trainer.degenerate),
        weights=_sample_weights(trainer, trainer.learners) if trainer.learners is not None else None,
    )
    checkpoint.finish(key, asdict(found))
    return found


def typical_step_seconds(times: list[float], settings: Settings) -> float:
    """Seconds per base step with its share of a meta step, from the time of every step.

    The mean over the steps between two meta steps of the median time of each of them, once meta steps have begun: other
    programs that use the machine for a while then hardly change it.
    """
    if len(times) < settings.meta_start + 2 * settings.unroll:
        return statistics.mean(times)
    steady = times[settings.meta_start :]
    return statistics.mean(statistics.median(steady[phase :: settings.unroll]) for phase in range(settings.unroll))


def _now(task: Task) -> float:
    if task.clean_labels.device.type == "cuda":
        torch.cuda.synchronize(task.clean_labels.device)
    return time.perf_counter()


@torch.no_grad()
def _sample_weights(trainer: Trainer, learners: MetaLearners) -> SampleWeights:
    task, model = trainer.task, trainer.model.eval()
    rows = task.evidence.covered.nonzero().squeeze(1)[:WEIGHT_SAMPLES]
    truth = task.train_labels[rows]
    logits = torch.cat([model(task.train.batch(part)) for part in torch.split(rows, 128)])
    losses, weights, targets = learners(logits, rows)
    weak_right = task.evidence.weak_targets[rows].argmax(dim=1) == truth
    used_right = targets.argmax(dim=1) == truth
    return SampleWeights(losses.cpu(), weights.cpu(), weak_right.cpu(), used_right.cpu())
