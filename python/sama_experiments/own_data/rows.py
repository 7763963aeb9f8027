"""One row of a user's file: what is read from it, and what makes it a bad one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

MAX_LINE = 8 << 20  # bytes: a longer line is a bad row, so that a file without line ends does not fill the memory


class BadRow(Exception):
    """Why a row cannot be used, in words."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it stands in the file.

    Attributes:
        row: its number among the data rows, bad ones included, from 0.
        line: number of the line on which it begins, from 1; None where the format has no lines.
        offset: of its first byte in the file; -1 where the format has no lines.
        raw: its bytes in the file (of an overlong line, the first ones); empty where the format has no lines.
        text, label: the two fields; empty for a bad row.
        problem: why it is a bad row, or None.
    """

    row: int
    line: int | None
    offset: int
    raw: bytes
    text: str
    label: str
    problem: str | None


class RowFile(Protocol):
    """A file of rows in one of the formats."""

    path: Path

    def scan(self) -> Iterator[Record]:
        """All rows, in order; one at a time is in memory."""

    def copy(self, out: Path, keep: bytearray) -> None:
        """Write the rows whose byte in ``keep`` is not 0, unchanged."""


def text_of(value: object, column: str) -> str:
    """The text of a row, or BadRow."""
    if value is None or value == "":
        raise BadRow(f"no {column}")
    if not isinstance(value, str):
        raise BadRow(f"{column} is a {type(value).__name__}, not a string")
    if not value.strip():
        raise BadRow(f"{column} is blank")
    return whole(value, column)


def whole(value: str, column: str) -> str:
    """`value`, or BadRow if it cannot be written."""
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can write it: "\ud800"
        raise BadRow(f"{column} holds half a character (a surrogate)") from None
    return value


def label_of(value: object, column: str) -> str:
    """The label of a row as a string (1, 1.0 and "1" are one label), or BadRow."""
    if value is None or value == "":
        raise BadRow(f"no {column}")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):  # integers become floats in a column with missing values
        if not value.is_integer():
            raise BadRow(f"{column} is neither a string nor an integer ({value})")
        return str(int(value))
    if not isinstance(value, str | int):
        raise BadRow(f"{column} is a {type(value).__name__}, not a string or an integer")
    name = whole(str(value), column)
    return name.partition(".")[0] if re.fullmatch(r"-?\d+\.0+", name) else name  # as pandas writes them to CSV
