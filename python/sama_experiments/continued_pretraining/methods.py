"""The methods that are compared, and every setting of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        key: name on the command line.
        title: name in the table.
        pretrains: so many steps on the auxiliary texts alone come first, as many as there are downstream steps.
        multitask: the base loss is the downstream loss plus that of the auxiliary texts.
        own_texts_only: the auxiliary texts are those of the task's own domain, which only a person can say.
        adaptation: how the meta gradient treats the base optimizer; None is no meta learning.
        sees: what the weight of a text is a function of: its loss alone, also its sentence features, or also which
            domain it is of (not which of them is the task's own).
        meta_on: whose labels the meta loss is taken on: those that are finetuned on, as in the paper, or the dev split.
    """

    key: str
    title: str
    pretrains: bool = False
    multitask: bool = False
    own_texts_only: bool = False
    adaptation: Literal["paper", "exact", "none"] | None = None
    sees: Literal["loss", "features", "domain"] = "loss"
    meta_on: Literal["train", "dev"] = "train"

    @property
    def meta(self) -> bool:
        """Whether weights are learned."""
        return self.adaptation is not None


METHODS = {
    method.key: method
    for method in (
        Method("finetune", "plain finetuning"),
        Method("dapt", "DAPT: pretraining, then finetuning", pretrains=True),
        Method("tartan-mt", "TARTAN-MT: equal weights", multitask=True),
        Method("tartan-mt-own", "TARTAN-MT on in-domain texts only", multitask=True, own_texts_only=True),
        Method("sama-na", "SAMA-NA: weight of loss and features", multitask=True, adaptation="none", sees="features"),
        Method("sama-loss", "SAMA: weight of the loss", multitask=True, adaptation="paper"),
        Method("sama", "SAMA: weight of loss and features", multitask=True, adaptation="paper", sees="features"),
        Method(
            "sama-dev",
            "SAMA: the same, meta loss on dev labels",
            multitask=True,
            adaptation="paper",
            sees="features",
            meta_on="dev",
        ),
        Method(
            "sama-domain",
            "SAMA: weight of loss and domain, dev labels",
            multitask=True,
            adaptation="paper",
            sees="domain",
            meta_on="dev",
        ),
    )
}


@dataclass(frozen=True)
class Settings:
    """Settings that all seeds of all methods share; the defaults are those of the command line.

    Attributes:
        steps: downstream steps, the same for every method.
        epochs: passes over the labelled texts in place of ``steps``; None: ``steps`` counts.
        labels: labelled texts to draw from the train split for each seed; None takes all.
        warmup: share of the steps in which the learning rate rises; it falls to 0 in the rest, both linearly.
        auxiliary_weight: factor of the masked-language-model loss.
        mean_one: weights are divided by their mean over the batch, so that they say which auxiliary texts count, not
            how much they count beside the labelled ones.
    """

    steps: int = 80
    epochs: int | None = None
    labels: int | None = 200
    batch_size: int = 16
    auxiliary_batch_size: int = 16
    auxiliary_weight: float = 0.1
    base_lr: float = 2e-4
    warmup: float = 0.1
    meta_lr: float = 1e-2
    meta_batch_size: int = 64
    meta_hidden: int = 64
    mean_one: bool = True
    meta_start: int = 10
    unroll: int = 1
    alpha: float = 0.15
    update_base: bool = False
    mask_share: float = 0.15
    pooling: str = "mean"
    curve_points: int = 2
