"""All methods on all seeds: prepares the texts once, draws the clean labels per seed, trains, and measures memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..common import processes
from ..common.checkpoints import Checkpoint
from ..common.encoder import EncodedTexts, PretrainedEncoder
from ..common.errors import ExperimentError
from ..common.memory import peak_bytes
from ..common.progress import Progress
from ..data import WeakDataset
from .evaluation import Run, run
from .evidence import ExampleEvidence
from .linear_probe import linear_probe_accuracy
from .methods import Method, Settings
from .training import Task, Trainer


@dataclass(frozen=True)
class MemoryUse:
    """Peak of the bytes that a few steps of a method hold, model and optimizer state included, texts not.

    With several processes, of that which holds the most.
    """

    bytes: int
    measure: str


class Experiment:
    """A data set and an encoder, ready to train any method on any seed."""

    def __init__(
        self,
        dataset: WeakDataset,
        encoder: PretrainedEncoder,
        settings: Settings,
        score_on: str,
        progress: Progress,
    ) -> None:
        self.clean_labels = len(dataset.dev) if settings.clean_labels is None else settings.clean_labels
        if self.clean_labels > len(dataset.dev):
            raise ExperimentError(f"--clean {self.clean_labels}: the dev split has only {len(dataset.dev)} labels")
        if score_on == "validation" and self.clean_labels == len(dataset.dev):
            raise ExperimentError(
                "--score-on validation: --clean takes the whole dev split, nothing is left to score on"
            )
        smallest = min(settings.batch_size, settings.clean_batch_size, settings.meta_batch_size, self.clean_labels)
        if smallest < processes.world():
            raise ExperimentError(
                f"{processes.world()} processes: --batch, --clean-batch, --meta-batch and --clean must be at least that"
            )
        self.dataset = dataset
        self.encoder = encoder
        self.settings = settings
        self.score_on = score_on
        scored = dataset.dev if score_on == "validation" else dataset.test
        progress.stage("encoding the texts", len(dataset.train) + len(dataset.dev) + len(dataset.test))
        self.train_texts = self._encode(dataset.train.texts, progress)
        self.dev_texts = self._encode(dataset.dev.texts, progress)
        self.scored_texts = self.dev_texts if score_on == "validation" else self._encode(scored.texts, progress)
        self.train_labels = dataset.train.labels.to(encoder.device)
        self.dev_labels = dataset.dev.labels.to(encoder.device)
        self.scored_labels = scored.labels.to(encoder.device)
        self.evidence = ExampleEvidence(
            self.train_texts.features,
            dataset.signals().to(encoder.device),
            dataset.weak_labels().to(encoder.device),
            len(dataset.classes),
        )

    def task(self, seed: int) -> Task:
        """The texts of one seed: it draws which dev labels are the clean ones."""
        clean, rest = self.draw_clean(seed)
        device = self.encoder.device
        scored = rest if self.score_on == "validation" else torch.arange(len(self.scored_labels))
        classes = len(self.dataset.classes)
        return Task(
            train=self.train_texts,
            train_labels=self.train_labels,
            evidence=self.evidence,
            clean=self.dev_texts,
            clean_labels=self.dev_labels,
            clean_index=clean.to(device),
            scored=self.scored_texts,
            scored_labels=self.scored_labels,
            scored_index=scored.to(device),
            classes=classes,
            new_classifier=lambda: self.encoder.classifier(classes, self.settings.pooling),
        )

    def draw_clean(self, seed: int) -> tuple[Tensor, Tensor]:
        """(rows of the dev split whose labels are the clean ones, the other rows), int64."""
        order = torch.randperm(len(self.dataset.dev), generator=torch.Generator().manual_seed(seed))
        return order[: self.clean_labels], order[self.clean_labels :]

    def run(self, method: Method, seed: int, progress: Progress, checkpoint: Checkpoint) -> Run:
        """Train one method on one seed, or take it up where the checkpoint has it."""
        steps = self.settings.steps if method.weak else self.settings.clean_steps
        progress.stage(f"seed {seed}: {method.title}", steps)
        return run(self.task(seed), method, self.settings, seed, progress.advance, checkpoint)

    def linear_probe(self, seed: int) -> float:
        """Accuracy of a logistic regression on frozen features, fitted to the clean labels of the seed."""
        return linear_probe_accuracy(self.task(seed))

    def memory(self, method: Method, seed: int) -> MemoryUse:
        """Peak memory of ten steps, each but the first followed by a meta step.

        Batches of every length are among them: ``shuffled_batches`` makes eight at a time, from short to long texts.
        """
        often = replace(self.settings, meta_start=1, unroll=1)

        def ten_steps() -> None:
            trainer = Trainer(self.task(seed), method, often, seed)
            for _ in range(10):
                trainer.step()

        size, measure = peak_bytes(ten_steps, self.encoder.device)
        return MemoryUse(processes.largest(size), measure)

    def _encode(self, texts: list[str], progress: Progress) -> EncodedTexts:
        report: Callable[[int], None] = progress.advance
        return self.encoder.encode(texts, report)
