"""Logistic regression on frozen sentence features: what the clean labels give with no finetuning at all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .training import Task

RIDGE = 0.3  # factor of the squared weights; the best of 0.03, 0.1, 0.3 on validation labels of the movie reviews
LBFGS_STEPS = 100


def linear_probe_accuracy(task: Task) -> float:
    """Fit on the clean labels, score on the texts to score; features are standardised by the training texts."""
    center, scale = task.train.features.mean(dim=0), task.train.features.std(dim=0) + 1e-6
    inputs = (task.clean.features[task.clean_index] - center) / scale
    labels = task.clean_labels[task.clean_index]
    weight = torch.zeros(inputs.shape[1], task.classes, device=inputs.device, requires_grad=True)
    bias = torch.zeros(task.classes, device=inputs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=LBFGS_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(inputs @ weight + bias, labels) + RIDGE * weight.pow(2).sum()
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    scored = (task.scored.features[task.scored_index] - center) / scale
    guessed = (scored @ weight + bias).argmax(dim=1)
    return (guessed == task.scored_labels[task.scored_index]).double().mean().item()
