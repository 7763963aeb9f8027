"""Scores of single samples: closed forms on what a model puts out. Each is high for samples that its method keeps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """|softmax - one-hot|_2 [B], from logits [B, K] (Paul, Ganguli and Dziugaite, "Deep learning on a data diet",
    2021; averaged over models that were trained for a few epochs)."""
    return _length(_error(logits, labels))


def grand(logits: Tensor, labels: Tensor, features: Tensor) -> Tensor:
    """Norm of the gradient of the sample's loss [B] (same source), by the parameters of the last layer.

    The gradient by a linear layer's weight is the outer product of softmax - one-hot and the features [B, H], that by
    its bias softmax - one-hot: no backward pass is needed. The full gradient would need one for each sample; the last
    layer is also what DeepCore (Guo et al., 2022) takes, whose CIFAR-10 figures the paper compares with.
    """
    return _length(_error(logits, labels)) * (features.square().sum(dim=1) + 1).sqrt()


def confidence_margin(logits: Tensor) -> Tensor:
    """Minus the difference of the two largest probabilities [B] (Coleman et al., "Selection via proxy", 2020)."""
    top = logits.softmax(dim=1).topk(2, dim=1).values
    return top[:, 1] - top[:, 0]


def boundary_margin(logits: Tensor, labels: Tensor, head: Tensor) -> Tensor:
    """Minus the distance of the features to the boundary between the label and the class that is likeliest besides it
    [B], from the weight [K, H] of the last layer (Wang et al., "DynaMS", 2023)."""
    own = logits.gather(1, labels[:, None])
    other, rival = logits.scatter(1, labels[:, None], -torch.inf).max(dim=1)
    return -(own.squeeze(1) - other).abs() / _length(head[labels] - head[rival])


class Forgetting:
    """Counts how often each of N samples went from right to wrong while a model was trained (Toneva et al., "An
    empirical study of example forgetting", 2019). Samples that were never right count as forgotten infinitely often.
    """

    def __init__(self, count: int) -> None:
        self.events = torch.zeros(count)
        self.was_right = torch.zeros(count, dtype=torch.bool)
        self.ever_right = torch.zeros(count, dtype=torch.bool)

    def see(self, index: Tensor, right: Tensor) -> None:
        """One look at the samples ``index`` (int64 [B]): whether each was right (bool [B])."""
        self.events[index] += (self.was_right[index] & ~right).float()
        self.was_right[index] = right
        self.ever_right[index] |= right

    def scores(self) -> Tensor:
        """float32 [N]."""
        return torch.where(self.ever_right, self.events, torch.inf)


def kept(scores: Tensor, ratio: float, draws: torch.Generator) -> Tensor:
    """The samples that are left, int64, sorted, when a share ``ratio`` is pruned: those with the lowest scores [N].

    Equal scores (numbers of forgettings) are pruned at random.
    """
    order = torch.randperm(len(scores), generator=draws)
    order = order[scores[order].argsort(stable=True)]
    return order[round(ratio * len(scores)) :].sort().values


def _length(rows: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return length


def _error(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.softmax(dim=1) - F.one_hot(labels, logits.shape[1])
