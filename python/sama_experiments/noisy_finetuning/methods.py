"""The methods that are compared, and every setting of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        key: name on the command line.
        title: name in the table.
        weak: trains on weakly labelled texts.
        clean: trains on the clean labels with an ordinary loss, alone or beside the weak texts.
        then_clean: the last `clean_steps` steps are finetuning on the clean labels alone, with a fresh optimizer.
        self_training: after half of the steps, COSINE self-training.
        algorithm: how the meta gradient is found (`sama_kernels.meta_grad`); None is no meta learning.
        corrects: has label correction beside the data weights.
        learns: whether the meta learners are trained; if not, only the base update of the meta step is left.
    """

    key: str
    title: str
    weak: bool = True
    clean: bool = False
    then_clean: bool = False
    self_training: bool = False
    algorithm: str | None = None
    corrects: bool = False
    learns: bool = True

    @property
    def meta(self) -> bool:
        """Whether the method has meta learners."""
        return self.algorithm is not None

    @property
    def sama(self) -> bool:
        """Whether the meta gradient is SAMA's: no second derivatives, and a meta step may move the base parameters."""
        return self.algorithm in ("sama", "sama_na")


# Tables 8 and 9 of the paper (its "DARTS (or T1-T2)" is t1_t2), and two more.
ALGORITHMS = {
    "iterative": "iterative differentiation",
    "conjugate_gradient": "conjugate gradients (iMAML)",
    "neumann": "Neumann series",
    "t1_t2": "T1-T2 (DARTS)",
    "nystrom": "Nystroem",
    "truncated": "truncated back-propagation",
}


def keys_of(algorithm: str) -> list[str]:
    """The methods with this algorithm: reweighting, and with label correction."""
    name = algorithm.replace("_", "-")
    return [f"{name}-r", f"{name}-rc"]


def _others() -> list[Method]:
    found = []
    for algorithm, title in ALGORITHMS.items():
        r, rc = keys_of(algorithm)
        found.append(Method(r, f"{title}, R", algorithm=algorithm))
        found.append(Method(rc, f"{title}, R & C", algorithm=algorithm, corrects=True))
    return found


METHODS = {
    method.key: method
    for method in (
        Method("weak", "finetune on weak labels"),
        Method("clean", "finetune on the clean labels alone", weak=False, clean=True),
        Method("pooled", "finetune on both at once, no meta learning", clean=True),
        Method("weak-clean", "finetune on weak, then on clean labels", then_clean=True),
        Method("cosine", "COSINE self-training", self_training=True),
        Method("sama-na-r", "SAMA-NA, reweighting (R)", algorithm="sama_na"),
        Method("sama-na-rc", "SAMA-NA, R & C", algorithm="sama_na", corrects=True),
        Method("sama-r", "SAMA, reweighting (R)", algorithm="sama"),
        Method("sama-rc-fixed", "SAMA, R & C, nets never trained", algorithm="sama", corrects=True, learns=False),
        Method("sama-rc", "SAMA, R & label correction (R & C)", algorithm="sama", corrects=True),
        Method("sama-rc-clean", "SAMA, R & C, then clean labels", algorithm="sama", corrects=True, then_clean=True),
        *_others(),
    )
}


@dataclass(frozen=True)
class Settings:
    """Settings that all seeds of all methods share; the defaults are those of the command line."""

    steps: int = 120
    clean_steps: int = 60
    batch_size: int = 32
    clean_batch_size: int = 16
    meta_batch_size: int = 32
    base_lr: float = 2e-4
    base_warmup: int = 20
    weight_decay: float = 0.0
    meta_lr: float = 1.5e-3
    meta_start: int = 20
    unroll: int = 2
    alpha: float = 0.15
    sync: str = "full"
    inner_terms: int = 5
    update_base: bool = True
    clean_in_base: bool = False
    clean_labels: int | None = 200
    clean_weight: float = 1.0
    abstentions: bool = False
    meta_hidden: int = 64
    pooling: str = "mean"
    curve_points: int = 4
