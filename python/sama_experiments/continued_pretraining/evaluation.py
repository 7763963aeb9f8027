"""A whole run: the training loop with its clock and checkpoints, the score, and the learned weights by domain."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.checkpoints import EVERY, Checkpoint
from .masking import MaskedCorpus
from .methods import Method, Settings
from .metrics import auc, score
from .model import MultitaskModel
from .training import LabelledRows, Task, Trainer

CURVE_TEXTS = 300  # texts that a point of the curve is measured on
WEIGHED_TEXTS = 150  # auxiliary texts of each domain that are looked at after a run


@dataclass(frozen=True)
class Run:
    """What came of one method and seed; lists by domain in the order of the corpus.

    Attributes:
        curve: (step, score on CURVE_TEXTS texts); the last point is on all texts to score.
        losses: mean masked-language-model loss of each domain at the end.
        weights: mean learned weight of each domain; empty where none are learned.
        weight_auc, loss_auc: how well the weight, or the bare loss, tells in-domain text from other text; None where
            there is one domain only, or no weight.
        sample: (domain, loss, weight) of the texts behind these figures, for the picture.
    """

    method: str
    seed: int
    score: float
    train_score: float
    curve: list[tuple[int, float]]
    steps: int
    seconds: float
    base_norm: float
    degenerate_meta_steps: int
    losses: list[float]
    weights: list[float]
    weight_auc: float | None
    loss_auc: float | None
    sample: list[tuple[int, float, float]]


def run(
    task: Task,
    method: Method,
    settings: Settings,
    seed: int,
    metric: str,
    kept: Checkpoint,
    on_step: Callable[[], None],
) -> Run:
    """Train one fresh model and score it, or go on where ``kept`` says; the clock runs during training steps only."""
    name = f"{method.key}, seed {seed}"
    if (finished := kept.result(name)) is not None:
        return Run(**finished)
    trainer = Trainer(task, method, settings, seed)
    curve: list[tuple[int, float]] = []
    seconds = 0.0
    if (state := kept.state(name)) is not None:
        trainer.resume(state["trainer"])
        curve, seconds = state["curve"], state["seconds"]
    points = {round(trainer.steps * i / settings.curve_points) for i in range(1, settings.curve_points)}
    for step in range(1, trainer.steps + 1):
        if step > trainer.step_count:
            started = _now(task)
            trainer.step()
            seconds += _now(task) - started
            if step in points:
                curve.append((step, scored(trainer.model, task.scored, metric, CURVE_TEXTS)))
            if step % EVERY == 0 and step < trainer.steps:
                kept.save(name, {"trainer": trainer.state(), "curve": curve, "seconds": seconds})
        on_step()
    final = scored(trainer.model, task.scored, metric)
    result = Run(
        method=method.key,
        seed=seed,
        score=final,
        train_score=scored(trainer.model, task.train, metric, CURVE_TEXTS),
        curve=[*curve, (trainer.steps, final)],
        steps=trainer.steps,
        seconds=seconds,
        base_norm=sum(float(p.detach().double().pow(2).sum()) for p in trainer.model.parameters()) ** 0.5,
        degenerate_meta_steps=sum(bool(flag) for flag in trainer.degenerate),
        **auxiliary_figures(trainer, task.corpus),
    )
    kept.finish(name, asdict(result))
    return result


@torch.no_grad()
def scored(model: MultitaskModel, labelled: LabelledRows, metric: str, most: int | None = None) -> float:
    """The metric of the model, without dropout, on (the first ``most`` of) the rows that count."""
    model.eval()
    rows = labelled.rows[:most]
    by_length = rows[labelled.texts.lengths[rows].argsort()]
    logits = torch.cat([model(labelled.texts.batch(part)) for part in torch.split(by_length, 128)])
    model.train()
    return score(metric, logits.argmax(dim=1), labelled.labels[by_length], logits.shape[1])


@torch.no_grad()
def auxiliary_figures(trainer: Trainer, corpus: MaskedCorpus) -> dict[str, Any]:
    """The fields of ``Run`` about auxiliary texts: some of each domain, with the same masks for every method."""
    model = trainer.model.eval()
    numbers = range(len(corpus.domains))
    rows = torch.cat([(corpus.domain == number).nonzero().squeeze(1)[:WEIGHED_TEXTS] for number in numbers])
    rows = rows[corpus.lengths[rows].argsort()]
    generator = torch.Generator().manual_seed(0)
    batches = [corpus.batch(part, generator) for part in torch.split(rows, 64)]
    losses = torch.cat([model.masked_losses(batch.inputs, batch.targets) for batch in batches])
    model.train()
    domain = corpus.domain[rows]
    own, several = domain == 0, len(corpus.domains) > 1
    found: dict[str, Any] = {"losses": _means(losses, domain, numbers), "weights": [], "weight_auc": None, "sample": []}
    found["loss_auc"] = auc(losses, own) if several else None
    if trainer.weigh is not None:
        weights = trainer.weigh(losses, rows)
        found["weights"] = _means(weights, domain, numbers)
        found["weight_auc"] = auc(weights, own) if several else None
        found["sample"] = list(zip(domain.tolist(), losses.tolist(), weights.tolist(), strict=True))
    return found


def _means(values: Tensor, domain: Tensor, numbers: range) -> list[float]:
    return [values[domain == number].mean().item() for number in numbers]


def _now(task: Task) -> float:
    if task.train.labels.device.type == "cuda":
        torch.cuda.synchronize(task.train.labels.device)
    return time.perf_counter()
