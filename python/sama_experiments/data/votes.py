"""Votes of labelling functions: the majority label, and features that show agreement and dissent."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ABSTAIN = -1


def _one_hot_votes(votes: Tensor, classes: int) -> Tensor:
    """[N, V] votes -> float32 [N, V, C]; an abstention is a row of zeros."""
    return F.one_hot(votes + 1, classes + 1)[..., 1:].float()


def majority_vote(
    votes: Tensor, classes: int, tie_breaker: torch.Generator | None = None, weights: Tensor | None = None
) -> Tensor:
    """The class with the most votes.

    Args:
        votes: int64 [N, V], a class or ABSTAIN.
        classes: number of classes C.
        tie_breaker: draws among the tied classes; None lets a tie abstain.
        weights: [C], what a vote for each class counts; None is 1.

    Returns:
        int64 [N], ABSTAIN where no labelling function votes.
    """
    counts = _one_hot_votes(votes, classes).sum(dim=1)
    if weights is not None:
        counts = counts * weights
    best = counts.amax(dim=1, keepdim=True)
    tied = counts == best
    if tie_breaker is None:
        winner = counts.argmax(dim=1).masked_fill(tied.sum(dim=1) > 1, ABSTAIN)
    else:
        winner = (tied * (1 + torch.rand(tied.shape, generator=tie_breaker))).argmax(dim=1)
    return winner.masked_fill(best.squeeze(1) == 0, ABSTAIN)


def vote_features(votes: Tensor, classes: int) -> Tensor:
    """What a person would look at to judge a weak label.

    Args:
        votes: int64 [N, V].
        classes: number of classes C.

    Returns:
        float32 [N, V*C + C + 2]: every vote one-hot, the share of votes per class, the share of labelling functions
        that vote at all, and the lead of the first class over the second.
    """
    one_hot = _one_hot_votes(votes, classes)
    counts = one_hot.sum(dim=1)
    total = counts.sum(dim=1, keepdim=True)
    share = counts / total.clamp(min=1)
    top = share.topk(2, dim=1).values
    return torch.cat([one_hot.flatten(1), share, total / votes.shape[1], top[:, :1] - top[:, 1:]], dim=1)
