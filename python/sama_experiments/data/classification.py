"""Folders in the format of "Don't stop pretraining" (Gururangan et al. 2020): train.jsonl, dev.jsonl, test.jsonl.

A line is ``{"text": ..., "label": ...}`` and may hold more; ChemProt, HyperPartisan, ACL-ARC and SciERC come like this.
Auxiliary text is a file with one text a line, or a .jsonl file whose lines hold a "text".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..common.errors import ExperimentError
from .text_dataset import LabelledTexts, TextDataset

SPLITS = ("train", "dev", "test")
OWN_TEXTS = "task"  # the domain of a task's own training texts


def load_classification(folder: str | Path, auxiliary: list[str] | None = None) -> TextDataset:
    """Read a folder; the classes are the labels of its train split, in alphabetical order.

    The auxiliary text is that of the train split (the paper's choice), and of each file in ``auxiliary`` a domain of
    its own, named after the file.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ExperimentError(f"--data {root}: no such folder")
    records = {split: list(_labelled(root / f"{split}.jsonl")) for split in SPLITS}
    classes = sorted({label for _, label in records["train"]})
    if len(classes) < 2:
        raise ExperimentError(f"{root / 'train.jsonl'}: {len(classes)} class(es); at least 2 are needed")
    splits = {}
    for split in SPLITS:
        unknown = {label for _, label in records[split]} - set(classes)
        if unknown:
            raise ExperimentError(f"{root / split}.jsonl: label {min(unknown)!r} is not in train.jsonl")
        labels = torch.tensor([classes.index(label) for _, label in records[split]])
        splits[split] = LabelledTexts([text for text, _ in records[split]], labels)
    domains = {OWN_TEXTS: splits["train"].texts}
    for path in map(Path, auxiliary or []):
        if path.stem in domains:
            raise ExperimentError(f"--auxiliary {path}: there is a domain {path.stem!r} already, rename the file")
        domains[path.stem] = load_texts(path)
    return TextDataset(root.resolve().name, classes, splits["train"], splits["dev"], splits["test"], domains)


def load_texts(path: Path) -> list[str]:
    """The texts of an auxiliary file; blank lines are left out."""
    if path.suffix == ".jsonl":
        texts = [_text(record, where) for record, where in _records(path)]
    else:
        texts = [line.strip() for line in _lines(path)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ExperimentError(f"{path}: holds no text")
    return texts


def _labelled(path: Path) -> Iterator[tuple[str, str]]:
    empty = True
    for record, where in _records(path):
        empty = False
        if "label" not in record:
            raise ExperimentError(f'{where}: no field "label"')
        label = record["label"]
        if not isinstance(label, str | int):  # bool is an int; HyperPartisan has true and false
            raise ExperimentError(f"{where}: label {label!r} is neither a string nor an integer")
        yield _text(record, where), str(label)
    if empty:
        raise ExperimentError(f"{path}: holds no texts")


def _text(record: dict[str, Any], where: str) -> str:
    text = record.get("text")
    if not isinstance(text, str):
        raise ExperimentError(f'{where}: no field "text" that is a string')
    return text


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """(object, where it stands) of each line that is not blank."""
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ExperimentError(f"{where} is not valid JSON: {error}") from error
            if not isinstance(record, dict):
                raise ExperimentError(f"{where}: expected a JSON object")
            yield record, where


def _lines(path: Path) -> list[str]:
    try:
        # not splitlines(): it also splits at characters, such as U+2028, that JSON strings may hold
        return path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ExperimentError(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise ExperimentError(f"{path}: {error.strerror}") from error
