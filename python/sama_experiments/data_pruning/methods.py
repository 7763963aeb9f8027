"""The methods that are compared, and every setting of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        key: name on the command line.
        title: name in the table.
        source: the search that its scores come from: "draw" (none), "full" (one full training), "early" (several short
            ones), "sama", "truth" (what was injected); None where samples are selected while training.
    """

    key: str
    title: str
    source: str | None


METHODS = {
    method.key: method
    for method in (
        Method("random", "random", "draw"),
        Method("el2n", "EL2N", "early"),
        Method("grand", "GraNd", "early"),
        Method("forgetting", "forgetting", "full"),
        Method("margin", "margin", "full"),
        Method("dynams", "DynaMS (dynamic)", None),
        Method("sama", "SAMA", "sama"),
        Method("oracle", "oracle", "truth"),
    )
}


@dataclass(frozen=True)
class Settings:
    """Settings that all seeds of all methods share; the defaults are those of the command line."""

    model: str = "cnn"
    epochs: int = 10
    batch_size: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-3
    schedule: str = "cosine"
    search_epochs: int = 8
    averaged_epochs: int = 5
    search_lr: float = 0.1
    search_momentum: float = 0.0
    meta_lr: float = 3e-4
    meta_hidden: int = 100
    unroll: int = 2
    alpha: float = 0.1
    sync: str = "full"
    update_base: bool = False
    average_decay: float = 0.95
    early_models: int = 3
    early_epochs: int = 2
    dynams_warmup: int = 1
    dynams_every: int = 1
    dynams_proxy: float = 0.5
