"""The form in which every data source hands its texts, true labels and votes to the programs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .votes import ABSTAIN, majority_vote, vote_features


@dataclass(frozen=True)
class Split:
    """Texts with what is known about each of them.

    Attributes:
        texts: N strings.
        labels: int64 [N], the human labels. For the training split they serve reports only.
        votes: int64 [N, V], the class each labelling function votes for, or ABSTAIN.
        scores: float32 [N, S], other signals of the labelling functions in about [-1, 1]; S may be 0.
    """

    texts: list[str]
    labels: Tensor
    votes: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, index: Tensor) -> Split:
        """The rows that ``index`` (int64) names, in its order."""
        texts = [self.texts[i] for i in index.tolist()]
        return Split(texts, self.labels[index], self.votes[index], self.scores[index])


@dataclass(frozen=True)
class WeakDataset:
    """A weakly labelled training split, human-labelled dev and test splits, and the names of the classes.

    ``vote_weights``, float64 [C], is what a vote for a class counts; None is 1 for all.
    """

    name: str
    classes: list[str]
    voters: list[str]
    train: Split
    dev: Split
    test: Split
    random_ties: bool
    vote_weights: Tensor | None = None

    def weak_labels(self) -> Tensor:
        """Majority vote on the training split: int64 [N], ABSTAIN where nobody votes.

        A tie is an abstention too, unless ties are drawn: those come from a generator of their own, so the weak labels
        are the same in every run.
        """
        generator = torch.Generator().manual_seed(0) if self.random_ties else None
        return majority_vote(self.train.votes, len(self.classes), generator, self.vote_weights)

    def signals(self) -> Tensor:
        """What the labelling functions say about each training text, as meta-learner input: float32 [N, F]."""
        return torch.cat([self.train.scores, vote_features(self.train.votes, len(self.classes))], dim=1)

    def weak_label_quality(self) -> tuple[float, float]:
        """(accuracy where there is a weak label, share of training texts that have one)."""
        weak = self.weak_labels()
        covered = weak != ABSTAIN
        right = (weak == self.train.labels)[covered].double().mean().item()
        return right, covered.double().mean().item()
