"""Folders in the format of WRENCH (Zhang et al. 2021): train.json, valid.json, test.json and label.json.

Each split is ``{id: {"data": {"text": ...}, "label": int, "weak_labels": [int, ...]}}`` with -1 for an abstention, and
label.json maps the class number (as a string) to its name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import ExperimentError
from .votes import ABSTAIN
from .weak_dataset import Split, WeakDataset


def load_wrench(folder: str | Path, weighted: bool = False) -> WeakDataset:
    """Read a WRENCH folder; ties of the vote are drawn at random, as WRENCH's own majority vote does.

    With ``weighted`` a vote counts as the share of its class in the dev split (WRENCH's weighted majority vote).
    """
    root = Path(folder)
    if not root.is_dir():
        raise ExperimentError(f"no data folder {root}")
    names = _read_json(root / "label.json")
    classes = [_field(names, str(i), root / "label.json") for i in range(len(names))]
    if len(classes) < 2:
        raise ExperimentError(f"{root / 'label.json'}: {len(classes)} class(es); at least 2 are needed")
    splits = {name: _read_split(root / f"{name}.json", len(classes)) for name in ("train", "valid", "test")}
    voters = [f"function {i + 1}" for i in range(splits["train"].votes.shape[1])]
    return WeakDataset(
        name=root.resolve().name,
        classes=classes,
        voters=voters,
        train=splits["train"],
        dev=splits["valid"],
        test=splits["test"],
        random_ties=True,
        vote_weights=_shares(splits["valid"], len(classes)) if weighted else None,
    )


def _shares(split: Split, classes: int) -> Tensor:
    return split.labels.bincount(minlength=classes).double() / len(split)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ExperimentError(
            f"no file {path} (a WRENCH folder holds train.json, valid.json, test.json and label.json)"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ExperimentError(f"{path}: expected a JSON object that is not empty")
    return content


def _field(record: Any, key: str, where: object) -> Any:
    if not isinstance(record, dict) or key not in record:
        raise ExperimentError(f'{where}: no field "{key}"')
    return record[key]


def _read_split(path: Path, classes: int) -> Split:
    texts: list[str] = []
    labels: list[int] = []
    votes: list[list[int]] = []
    for name, record in _read_json(path).items():
        where = f"{path}, record {name}"
        text = _field(_field(record, "data", where), "text", f"{where}, data")
        if not isinstance(text, str):
            raise ExperimentError(f"{where}: text is not a string")
        label, weak = _field(record, "label", where), _field(record, "weak_labels", where)
        if label not in range(classes):
            raise ExperimentError(f"{where}: label {label!r} is not one of the {classes} classes of label.json")
        if not isinstance(weak, list) or any(vote not in range(ABSTAIN, classes) for vote in weak):
            raise ExperimentError(f"{where}: weak_labels must be a list of class numbers and -1")
        if not weak or (votes and len(weak) != len(votes[0])):
            expected = len(votes[0]) if votes else "at least 1"
            raise ExperimentError(f"{where}: {len(weak)} weak_labels, expected {expected}")
        texts.append(text)
        labels.append(label)
        votes.append(weak)
    return Split(texts, torch.tensor(labels), torch.tensor(votes), torch.zeros(len(texts), 0))
