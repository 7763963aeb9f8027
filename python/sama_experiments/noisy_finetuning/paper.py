"""The paper's accuracies (%), Tables 1, 8 and 9: BERT-base on six data sets of WRENCH, mean of 3 runs."""

from __future__ import annotations

DATASETS = ("trec", "semeval", "imdb", "chemprot", "agnews", "yelp")

_TABLE_1 = {
    "weak": (67.93, 79.28, 78.16, 57.35, 85.79, 84.32),
    "cosine": (76.56, 86.80, 82.98, 58.47, 87.03, 89.22),
    "sama-na-r": (74.33, 87.11, 81.92, 60.88, 86.83, 80.96),
    "sama-na-rc": (79.00, 87.67, 80.44, 64.05, 87.05, 80.73),
    "sama-r": (85.73, 89.67, 84.31, 76.89, 89.05, 93.64),
    "sama-rc": (87.93, 88.83, 85.71, 77.78, 89.79, 93.77),
}
_TABLES_8_9 = {  # AGNews, IMDB
    "iterative-r": (85.78, 80.25),
    "conjugate-gradient-r": (86.78, 81.01),
    "neumann-r": (86.65, 79.92),
    "t1-t2-r": (86.36, 80.47),
}


def nearest(dataset: str) -> str:
    """The paper's data set to show beside ``dataset``: itself, or for other data (movie reviews) its own, IMDB."""
    name = dataset.lower().replace("-", "").replace("_", "")
    return next((known for known in DATASETS if name.startswith(known)), "imdb")


def accuracy(dataset: str, method: str) -> float | None:
    """The paper's figure for one of ``DATASETS`` and a key of ``METHODS``; None where it has none."""
    if method in _TABLE_1:
        return _TABLE_1[method][DATASETS.index(dataset)]
    if method in _TABLES_8_9 and dataset in ("agnews", "imdb"):
        return _TABLES_8_9[method][dataset == "imdb"]
    return None
