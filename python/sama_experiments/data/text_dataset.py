"""Labelled text data with auxiliary text beside it: what continued pretraining needs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LabelledTexts:
    """N texts and their classes (int64 [N])."""

    texts: list[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TextDataset:
    """A downstream task and unlabelled text to pretrain on.

    Attributes:
        name: the usual name of the task.
        classes: the name of each class.
        auxiliary: texts without labels by the name of their domain; the first one is the task's own, in-domain.
    """

    name: str
    classes: list[str]
    train: LabelledTexts
    dev: LabelledTexts
    test: LabelledTexts
    auxiliary: dict[str, list[str]]
