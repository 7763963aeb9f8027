"""Scores of predictions, and of learned weights as a detector of in-domain text."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.errors import ExperimentError

METRICS = ("accuracy", "micro-f1", "macro-f1")


def metric_for(dataset: str) -> str:
    """The literature's metric: micro-F1 for ChemProt, macro-F1 for the other data sets of Table 3."""
    if dataset == "movie reviews":
        return "accuracy"
    return "micro-f1" if dataset.lower() == "chemprot" else "macro-f1"


def score(metric: str, predicted: Tensor, labels: Tensor, classes: int) -> float:
    """predicted and labels, int64 [N] -> a share between 0 and 1.

    With one label a text micro-F1 is the accuracy. Macro-F1 is the mean over all classes of the task; of a class that
    is neither there nor predicted it is 0.
    """
    if metric in ("accuracy", "micro-f1"):
        return (predicted == labels).double().mean().item()
    if metric != "macro-f1":
        raise ExperimentError(f"--metric {metric}: expected one of {', '.join(METRICS)}")
    pairs = torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes).double()
    right = pairs.diagonal()
    f1 = 2 * right / (pairs.sum(dim=0) + pairs.sum(dim=1)).clamp(min=1)
    return f1.mean().item()


def auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: how often a positive (bool [N]) has the higher score [N]; ties count half."""
    _, place, count = torch.unique(scores.double(), return_inverse=True, return_counts=True)
    rank = count.cumsum(0) - (count - 1) / 2  # mean rank, from 1, of each value
    positives = int(positive.sum())
    negatives = len(scores) - positives
    above = float(rank[place][positive].sum()) - positives * (positives + 1) / 2
    return above / (positives * negatives)
