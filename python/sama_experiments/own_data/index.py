"""Which rows of a file are good, where they begin, and what is wrong with the others: found in one pass.

Texts stay in the file. What is kept of a row is its number (8 bytes), where it begins (8), its label (4) and the length
of its text (4), so a file may be larger than the memory.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TextIO

import torch
from torch import Tensor

from ..common.errors import ExperimentError
from .lines import JsonLinesFile, TextFile
from .rows import Record, RowFile

EXCERPT = 200  # characters of a bad row that are listed
REPORT_EVERY = 1000  # rows


@dataclass
class BadRows:
    """Counts the bad rows and lists them in a JSON Lines file: file, row, line, reason, how the row begins.

    ``counts`` is by file and reason without its details in parentheses, of which there could be as many as rows.
    """

    out: TextIO
    counts: dict[Path, Counter[str]] = field(default_factory=dict)

    def add(self, path: Path, record: Record, reason: str) -> None:
        """One more."""
        self.counts.setdefault(path, Counter())[reason.partition(" (")[0]] += 1
        begins = record.raw[: 4 * EXCERPT].decode(errors="replace") or record.text
        entry = {"file": str(path), "row": record.row, "line": record.line, "reason": reason}
        self.out.write(json.dumps({**entry, "content": begins[:EXCERPT]}, ensure_ascii=False) + "\n")

    def of(self, path: Path) -> Counter[str]:
        """How many of each reason in this file."""
        return self.counts.get(path, Counter())


@dataclass(frozen=True)
class CleanSet:
    """The rows with labels to trust, which are few: their texts are kept in memory.

    ``labels`` is int64 [M], places in ``classes``, which are sorted.
    """

    texts: list[str]
    labels: Tensor
    classes: list[str]


def read_clean(file: RowFile, bad: BadRows) -> CleanSet:
    """The good rows of the clean file; its bad ones are listed as well."""
    texts: list[str] = []
    names: list[str] = []
    for record in file.scan():
        if record.problem is not None:
            bad.add(file.path, record, record.problem)
            continue
        texts.append(record.text)
        names.append(record.label)
    classes = sorted(set(names))
    if len(classes) < 2:
        found = f"only the class {classes[0]!r}" if classes else "no good row" + most_common(bad.of(file.path))
        raise ExperimentError(f"--clean {file.path}: {found}; it must hold good rows of two classes or more")
    number = {name: i for i, name in enumerate(classes)}
    return CleanSet(texts, torch.tensor([number[name] for name in names]), classes)


class RowIndex:
    """The N good rows of a file, each named by its place among them, from 0.

    Args:
        spool: where the texts of a format without lines are copied to, one a line, so that they can be read in any
            order (the rows of a Parquet file can be read only together with thousands of others).
        look: is shown every good row.

    Attributes:
        rows: int64 [N], their numbers in the file.
        labels: int32 [N], places in ``classes``.
        lengths: int32 [N], characters of the texts.
        total: rows of the file, bad ones included.
    """

    def __init__(
        self,
        file: RowFile,
        classes: list[str],
        bad: BadRows,
        spool: Path,
        look: Callable[[Record], None] = lambda record: None,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> None:
        if isinstance(file, TextFile):
            self.total, columns = _pass_over(file, classes, bad, None, look, progress)
            self._texts: TextFile = file
        else:
            with open(spool, "wb") as copy:
                self.total, columns = _pass_over(file, classes, bad, copy, look, progress)
            self._texts = JsonLinesFile(spool, "text", "label")
        if not columns[0]:
            raise ExperimentError(f"--train {file.path} has no good row{most_common(bad.of(file.path))}")
        self.rows, self._offsets = (torch.frombuffer(column, dtype=torch.int64) for column in columns[:2])
        self.labels, self.lengths = (torch.frombuffer(column, dtype=torch.int32) for column in columns[2:])

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self, places: Tensor) -> list[str]:
        """The texts of good rows; places: int64 [B], in any order."""
        return self._texts.texts(self._offsets[places].tolist())


def most_common(counts: Counter[str]) -> str:
    """The reason that most bad rows share, to add to a message."""
    return "".join(f" (most often: {reason})" for reason, _ in counts.most_common(1))


def _pass_over(
    file: RowFile,
    classes: list[str],
    bad: BadRows,
    copy: BinaryIO | None,
    look: Callable[[Record], None],
    progress: Callable[[int], None],
) -> tuple[int, list[array[int]]]:
    """(rows in all, columns: row numbers, offsets, labels, lengths); texts are written to ``copy`` and found there."""
    number = {name: i for i, name in enumerate(classes)}
    columns = [array("q"), array("q"), array("i"), array("i")]
    total = 0
    for record in file.scan():
        total += 1
        if total % REPORT_EVERY == 0:
            progress(REPORT_EVERY)
        problem = record.problem
        if problem is None and record.label not in number:
            problem = f"a label that is not among the classes of --clean ({record.label[:EXCERPT]})"
        if problem is not None:
            bad.add(file.path, record, problem)
            continue
        look(record)
        offset = record.offset
        if copy is not None:
            offset = copy.tell()
            copy.write(json.dumps({"text": record.text, "label": ""}).encode() + b"\n")
        for column, value in zip(columns, (record.row, offset, number[record.label], len(record.text)), strict=True):
            column.append(value)
    return total, columns
