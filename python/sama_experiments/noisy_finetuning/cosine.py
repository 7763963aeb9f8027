"""COSINE self-training (Yu et al., "Fine-tuning pre-trained language model with weak supervision", 2021), a baseline.

After finetuning on the weak labels the model learns from soft labels of its own, of the texts that it is sure about;
pairs of texts with the same label are pulled together, others apart, and sure predictions are held back.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLD = 0.6  # confidence from which on a text counts
MARGIN = 1.0  # gamma: texts of different labels are pushed this far apart
CONFIDENCE_WEIGHT = 0.1  # lambda, of the regulariser against overconfidence
REFRESH = 20  # steps between two updates of the model that gives the labels


def soft_labels(probabilities: Tensor) -> Tensor:
    """p [B, C] -> p^2 over the class's share of the batch, normalised: sharper, and balanced between classes."""
    sharpened = probabilities.square() / probabilities.sum(dim=0, keepdim=True)
    return sharpened / sharpened.sum(dim=1, keepdim=True)


def confidence(labels: Tensor) -> Tensor:
    """1 - entropy / log C of label distributions [B, C]: [B], 0 for the uniform one, 1 for a one-hot one."""
    entropy = -torch.xlogy(labels, labels).sum(dim=1)
    return 1 - entropy / math.log(labels.shape[1])


def contrast(features: Tensor, labels: Tensor) -> Tensor:
    """Mean over all pairs of features [B, H]: d^2 for one label, max(0, margin - d)^2 for two, d = |a - b|^2 / H."""
    squares = features.square().sum(dim=1)
    distance = (squares[:, None] + squares[None, :] - 2 * features @ features.T).clamp(min=0) / features.shape[1]
    classes = labels.argmax(dim=1)
    alike = classes[:, None] == classes[None, :]
    return torch.where(alike, distance.square(), (MARGIN - distance).clamp(min=0).square()).mean()


def cosine_loss(logits: Tensor, features: Tensor, teacher: Tensor) -> Tensor:
    """The whole loss of a batch.

    Args:
        logits: [B, C] of the model. features: [B, H], what its last layer reads. teacher: [B, C], probabilities of the
            model of some steps ago, without a gradient.

    Returns:
        0-dim; 0 where the teacher is sure of no text.
    """
    labels = soft_labels(teacher)
    weight = confidence(labels)
    sure = (weight > THRESHOLD).nonzero().squeeze(1)
    if len(sure) == 0:
        return 0 * logits.sum()
    logits, features, labels, weight = logits[sure], features[sure], labels[sure], weight[sure]
    log_p = logits.log_softmax(dim=1)
    fitted = (weight * F.kl_div(log_p, labels, reduction="none").sum(dim=1)).mean()
    overconfident = -log_p.mean() - math.log(logits.shape[1])  # KL(uniform || p)
    return fitted + contrast(features, labels) + CONFIDENCE_WEIGHT * overconfident
