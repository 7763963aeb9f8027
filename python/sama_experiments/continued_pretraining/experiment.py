"""All methods on all seeds: encodes the texts and fits the language head once, draws the labelled texts per seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from ..common.checkpoints import Checkpoint
from ..common.encoder import PretrainedEncoder
from ..common.errors import ExperimentError
from ..common.progress import Progress
from ..data import LabelledTexts, TextDataset
from .evaluation import Run, run
from .language_head import fit_language_head
from .masking import MaskedCorpus
from .methods import Method, Settings
from .model import LanguageHead, MultitaskModel, new_language_head, pretrained_language_head
from .training import LabelledRows, Task

HEAD = "language head"  # name under which the checkpoint keeps the fitted one
MASK_SEED = 0


@dataclass(frozen=True)
class Preparation:
    """How the texts are prepared.

    Attributes:
        mask_draws: masks of each auxiliary text where the lower layers are frozen.
        head_steps: to fit a language head to a model that has none.
        score_on: "test", or "validation", the dev split, for tuning.
        score_texts: texts to score on, None for all of the split.
    """

    mask_draws: int
    head_steps: int
    score_on: str
    score_texts: int | None


class Experiment:
    """A data set and an encoder, ready to train any method on any seed."""

    def __init__(
        self,
        dataset: TextDataset,
        encoder: PretrainedEncoder,
        model_folder: Path,
        settings: Settings,
        preparation: Preparation,
        methods: list[Method],
        metric: str,
        kept: Checkpoint,
        progress: Progress,
    ) -> None:
        self.settings = settings
        self.metric = metric
        self.encoder = encoder
        self.dataset = dataset
        self.kept = kept
        self.labels = len(dataset.train) if settings.labels is None else settings.labels
        if self.labels > len(dataset.train):
            raise ExperimentError(f"--labels {self.labels}: the train split has only {len(dataset.train)} texts")
        self.steps = settings.steps
        if settings.epochs is not None:
            self.steps = settings.epochs * math.ceil(self.labels / settings.batch_size)
        validation = preparation.score_on == "validation"
        on_dev = [method.key for method in methods if method.meta_on == "dev"]
        if validation and on_dev:
            raise ExperimentError(f"--score-on validation: {on_dev[0]} learns from these texts, leave it out")
        self.train = self._encode("train", dataset.train, progress)
        self.dev = self._encode("dev", _first(dataset.dev, preparation), progress) if on_dev else None
        self.scored = self._encode("scored", _first(dataset.dev if validation else dataset.test, preparation), progress)
        draws = 1 if encoder.train_layers is None else preparation.mask_draws
        size = draws * sum(map(len, dataset.auxiliary.values()))
        progress.stage("encoding the auxiliary texts", size)
        report: Callable[[int], None] = progress.advance
        self.corpus = MaskedCorpus(encoder, dataset.auxiliary, settings.mask_share, draws, MASK_SEED, report)
        of_domain = F.one_hot(self.corpus.domain, len(dataset.auxiliary)).float()
        self.evidence = {"features": self.corpus.features(), "domain": of_domain}
        self.head = self._language_head(model_folder, preparation.head_steps, progress)

    def task(self, seed: int) -> Task:
        """The texts of one seed: it draws which train texts have labels."""
        order = torch.randperm(len(self.train.rows), generator=torch.Generator().manual_seed(seed))
        train = replace(self.train, rows=order[: self.labels].to(self.encoder.device))
        return Task(
            train=train,
            dev=self.dev,
            scored=self.scored,
            corpus=self.corpus,
            evidence=self.evidence,
            steps=self.steps,
            new_model=self._new_model,
        )

    def run(self, method: Method, seed: int, progress: Progress) -> Run:
        """Train one method on one seed, or return what the checkpoint has of it."""
        progress.stage(f"seed {seed}: {method.title}", self.steps * (2 if method.pretrains else 1))
        return run(self.task(seed), method, self.settings, seed, self.metric, self.kept, progress.advance)

    def _new_model(self) -> MultitaskModel:
        return MultitaskModel(self.encoder, len(self.dataset.classes), self.settings.pooling, self.head)

    def _encode(self, name: str, split: LabelledTexts, progress: Progress) -> LabelledRows:
        progress.stage(f"encoding the {name} texts", len(split))
        texts = self.encoder.encode(split.texts, progress.advance)
        device = self.encoder.device
        return LabelledRows(texts, split.labels.to(device), torch.arange(len(split), device=device))

    def _language_head(self, folder: Path, steps: int, progress: Progress) -> LanguageHead:
        head = pretrained_language_head(self.encoder, folder)
        if head is not None:
            return head
        if (fitted := self.kept.result(HEAD)) is not None:
            head = new_language_head(self.encoder)
            head.load_state_dict(fitted)
            return head.to(self.encoder.device)
        progress.stage("fitting a language head", steps)
        head = fit_language_head(self.encoder, self.corpus, steps, MASK_SEED, progress.advance)
        self.kept.finish(HEAD, {name: value.clone() for name, value in head.state_dict().items()})
        return head


def _first(split: LabelledTexts, preparation: Preparation) -> LabelledTexts:
    most = preparation.score_texts
    return LabelledTexts(split.texts[:most], split.labels[:most])
