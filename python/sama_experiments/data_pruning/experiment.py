"""All methods at all pruning ratios on one seed: the searches, then a training on what each leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.checkpoints import Checkpoint
from ..common.progress import Progress
from . import scores
from .dynams import DynamsTraining
from .images import Dataset, Truth, seeded
from .methods import METHODS, Method
from .options import Options
from .sama import SamaSearch
from .training import FullTraining, Trainer


@dataclass(frozen=True)
class Search:
    """What a search gave: the scores [N] of the methods that rest on it, its time, and what else it tells.

    ``norm`` is that of the base parameters at the end, ``degenerate`` the number of meta steps that found no direction.
    """

    source: str
    seed: int
    seconds: float
    accuracy: float
    scores: dict[str, Tensor]
    norm: float = 0.0
    degenerate: int = 0


@dataclass(frozen=True)
class Run:
    """A training on what a method leaves of the training data.

    ``search_seconds`` is the time spent on finding it; the last four are shares, None where nothing was injected.
    """

    method: str
    ratio: float
    seed: int
    accuracy: float
    seconds: float
    search_seconds: float
    samples_seen: float
    wrong_among_pruned: float | None = None
    wrong_found: float | None = None
    pairs_reduced: float | None = None
    pairs_lost: float | None = None


def findings(truth: Truth | None, kept: Tensor) -> dict[str, float | None]:
    """How what was pruned compares with what was injected.

    ``wrong_among_pruned`` is the precision and ``wrong_found`` the recall of pruning for wrong labels. Of the pairs of
    a sample and its copy, ``pairs_reduced`` have lost one, as they should, or both; ``pairs_lost`` both.
    """
    if truth is None:
        return {}
    pruned = torch.ones_like(truth.wrong)
    pruned[kept] = False
    copies = truth.copy.nonzero().squeeze(1)
    gone = pruned[copies].int() + pruned[truth.twin[copies]].int()
    return {
        "wrong_among_pruned": _share(truth.wrong[pruned]),
        "wrong_found": _share(pruned[truth.wrong]),
        "pairs_reduced": _share(gone > 0),
        "pairs_lost": _share(gone == 2),
    }


def _share(flags: Tensor) -> float | None:
    return flags.double().mean().item() if len(flags) else None


class Experiment:
    """The searches and trainings of one seed. What the checkpoint has of an earlier program is not done again."""

    def __init__(self, data: Dataset, options: Options, seed: int, checkpoint: Checkpoint, progress: Progress) -> None:
        self.data = data
        self.options = options
        self.settings = options.settings
        self.seed = seed
        self.checkpoint = checkpoint
        self.progress = progress

    def searches(self, methods: list[Method]) -> dict[str, Search]:
        """The full training, and what else ``methods`` need, by source."""
        wanted = {method.source for method in methods}
        found = {"full": self._search("full", self._full)}
        for source, make in (("early", self._early), ("sama", self._sama), ("truth", self._truth)):
            if source in wanted:
                found[source] = self._search(source, make)
        return found

    def run(self, method: Method, ratio: float, searches: dict[str, Search]) -> Run:
        """Prune, and train on what is left, with the seed of the full training."""
        name = f"seed {self.seed}: {method.key} {100 * ratio:g} %"
        done = self.checkpoint.result(name)
        if done is None:
            trainer, search_seconds = self._trainer(method, ratio, searches)
            seen = self._train(name, trainer)
            if isinstance(trainer, DynamsTraining):
                search_seconds = trainer.selection_seconds
            run = Run(
                method=method.key,
                ratio=ratio,
                seed=self.seed,
                accuracy=trainer.accuracy(),
                seconds=trainer.seconds,
                search_seconds=search_seconds,
                samples_seen=seen,
                **findings(self.data.truth, trainer.rows),
            )
            done = asdict(run)
            self.checkpoint.finish(name, done)
        return Run(**done)

    def _trainer(self, method: Method, ratio: float, searches: dict[str, Search]) -> tuple[Trainer, float]:
        if method.source is None:
            return DynamsTraining(self.data, self.settings, self.seed, ratio), 0.0
        count, seconds = len(self.data.train.labels), 0.0
        if method.source == "draw":
            values = torch.zeros(count)  # equal scores are pruned at random
        else:
            search = searches[method.source]
            values, seconds = search.scores[method.key], search.seconds
        rows = scores.kept(values, ratio, seeded(self.seed, list(METHODS).index(method.key)))
        return Trainer(self.data, self.settings, self.seed, self.settings.epochs, rows), seconds

    def _train(self, name: str, trainer: Trainer) -> float:
        """Train to the end, from where an earlier program was; gives the share of samples seen, 1 for all of them."""
        state = self.checkpoint.state(name)
        seen = 0.0
        if state is not None:
            trainer.resume(state["trainer"])
            seen = state["seen"]
        self.progress.stage(name, trainer.epochs)
        self.progress.advance(trainer.epoch)
        while trainer.epoch < trainer.epochs:
            trainer.run_epoch()
            seen += len(trainer.rows) / len(self.data.train.labels) / trainer.epochs
            if trainer.epoch < trainer.epochs:
                self.checkpoint.save(name, {"trainer": trainer.state(), "seen": seen})
            self.progress.advance()
        return seen

    def _search(self, source: str, make: Callable[[str], Search]) -> Search:
        name = f"seed {self.seed}: search, {source}"
        done: dict[str, Any] | None = self.checkpoint.result(name)
        if done is None:
            done = vars(make(name))
            self.checkpoint.finish(name, done)
        return Search(**done)

    def _full(self, name: str) -> Search:
        trainer = FullTraining(self.data, self.settings, self.seed)
        self._train(name, trainer)
        (margin,) = trainer.score(self.data.train, lambda logits, *_: scores.confidence_margin(logits))
        found = {"forgetting": trainer.forgetting.scores(), "margin": margin}
        return Search("full", self.seed, trainer.seconds, trainer.accuracy(), found)

    def _early(self, name: str) -> Search:
        """EL2N and GraNd, averaged over models that are trained for a few epochs, with seeds of their own."""
        count, total = len(self.data.train.labels), self.settings.early_models
        sums, seconds, accuracy = {"el2n": torch.zeros(count), "grand": torch.zeros(count)}, 0.0, 0.0
        for number in range(total):
            part = f"{name}, model {number + 1}"
            done = self.checkpoint.result(part)
            if done is None:
                trainer = Trainer(self.data, self.settings, 1000 * self.seed + number + 1, self.settings.early_epochs)
                self._train(part, trainer)
                with trainer.clock():
                    el2n, grand = trainer.score(
                        self.data.train, lambda logits, labels, _: scores.el2n(logits, labels), scores.grand
                    )
                done = {"el2n": el2n, "grand": grand}
                done |= {"seconds": trainer.seconds, "accuracy": trainer.accuracy()}
                self.checkpoint.finish(part, done)
            for key, value in sums.items():
                value += done[key] / total
            seconds += done["seconds"]
            accuracy += done["accuracy"] / total
        return Search("early", self.seed, seconds, accuracy, sums)

    def _sama(self, name: str) -> Search:
        search = SamaSearch(self.data, self.settings, self.seed)
        self._train(name, search)
        norm = torch.stack([p.detach().norm() for p in search.model.parameters()]).norm().item()
        found = {"sama": search.scores()}
        return Search("sama", self.seed, search.seconds, search.accuracy(), found, norm, search.degenerate)

    def _truth(self, name: str) -> Search:
        """What a method would do that knows what was injected: wrong labels go first, then copies."""
        truth = self.data.truth
        assert truth is not None  # held by the options
        return Search("truth", self.seed, 0.0, 0.0, {"oracle": 2.0 - 2.0 * truth.wrong.float() - truth.copy.float()})
