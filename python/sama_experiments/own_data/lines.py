"""The text formats: JSON Lines, and CSV or TSV with a header. Rows are found again by where they begin, in bytes."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..common.errors import ExperimentError
from .rows import MAX_LINE, BadRow, Record, label_of, text_of

csv.field_size_limit(MAX_LINE)
BOM = b"\xef\xbb\xbf"
LOOK_FOR_FIELDS = 100  # rows of a JSON Lines file that may lack a field before it is taken for missing


class TornRow(BadRow):
    """It is not clear where the row ends."""


class LineReader:
    """Iterates over the decoded lines of a binary file and remembers which bytes they were."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.position = file.tell()
        self.begin_row()

    def begin_row(self) -> None:
        """Forget the lines so far."""
        self.taken: list[bytes] = []
        self.not_utf8 = False

    def __iter__(self) -> LineReader:
        return self

    def __next__(self) -> str:
        raw = self.file.readline(MAX_LINE)
        if not raw:
            raise StopIteration
        self.taken.append(raw)
        self.position += len(raw)
        if len(raw) == MAX_LINE and not raw.endswith(b"\n"):
            while rest := self.file.readline(MAX_LINE):
                self.position += len(rest)
                if rest.endswith(b"\n"):
                    break
            raise TornRow(f"a line of more than {MAX_LINE >> 20} MiB")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.not_utf8 = True  # told when the row is complete
            return raw.decode(errors="replace")


class TextFile(ABC):
    """What the text formats share."""

    def __init__(self, path: Path, text: str, label: str) -> None:
        self.path = path
        self.text = text
        self.label = label
        self.start = 0  # first byte of the first row
        self._file: BinaryIO | None = None

    def scan(self) -> Iterator[Record]:
        """All rows, in order."""
        with open(self.path, "rb") as file:
            line = 1 + file.read(self.start).count(b"\n")
            reader = LineReader(file)
            row = 0
            while True:
                offset = reader.position
                reader.begin_row()
                try:
                    fields = self._next(reader)
                    if fields is None:
                        return
                    if reader.not_utf8:
                        raise BadRow("not UTF-8")
                    good = text_of(fields[0], self.text), label_of(fields[1], self.label)
                    record = Record(row, line, offset, b"".join(reader.taken), *good, None)
                except BadRow as error:
                    if isinstance(error, TornRow) and len(reader.taken) > 1:
                        # An open quote has swallowed the lines that follow: only the first of them is to blame.
                        del reader.taken[1:]
                        reader.position = offset + len(reader.taken[0])
                        file.seek(reader.position)
                    record = Record(row, line, offset, b"".join(reader.taken), "", "", str(error))
                yield record
                row += 1
                line += len(reader.taken)

    def texts(self, offsets: list[int]) -> list[str]:
        """The texts of the good rows that begin at these bytes."""
        if self._file is None:
            self._file = open(self.path, "rb")  # noqa: SIM115  # stays open from batch to batch
        found = []
        for offset in offsets:
            self._file.seek(offset)
            fields = self._next(LineReader(self._file))
            if fields is None:
                raise ExperimentError(f"{self.path} was changed while it was read")
            found.append(text_of(fields[0], self.text))
        return found

    def copy(self, out: Path, keep: bytearray) -> None:
        """Write the header and the rows to keep, byte for byte."""
        with open(self.path, "rb") as file, open(out, "wb") as kept:
            kept.write(file.read(self.start))
            for record in self.scan():
                if keep[record.row]:
                    kept.write(record.raw)

    @abstractmethod
    def _next(self, reader: LineReader) -> tuple[Any, Any] | None:
        """(text, label) of the next row as they stand there; None at the end of the file; BadRow."""


def _skip_mark(file: BinaryIO) -> int:
    """Go to behind the byte order mark, if there is one; where that is."""
    start = len(BOM) if file.read(len(BOM)) == BOM else 0
    return file.seek(start)


class JsonLinesFile(TextFile):
    """A JSON object in each line."""

    def __init__(self, path: Path, text: str, label: str) -> None:
        super().__init__(path, text, label)
        fields: dict[str, None] = {}
        with open(path, "rb") as file:
            self.start = _skip_mark(file)
            for _ in range(LOOK_FOR_FIELDS):
                reader = LineReader(file)
                try:
                    fields.update(dict.fromkeys(self._object(next(reader))))
                except StopIteration:
                    break
                except BadRow:
                    continue
        for name, flag in ((text, "--text"), (label, "--label")):
            if fields and name not in fields:
                raise ExperimentError(f"{flag} {name}: {path} has no such field; its fields are {', '.join(fields)}")

    def _next(self, reader: LineReader) -> tuple[Any, Any] | None:
        try:
            line = next(reader)
        except StopIteration:
            return None
        fields = self._object(line)
        return fields.get(self.text), fields.get(self.label)

    @staticmethod
    def _object(line: str) -> dict[str, Any]:
        if not line.strip():
            raise BadRow("empty line")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"broken JSON ({str(error).splitlines()[0]})") from None
        if not isinstance(value, dict):
            raise BadRow(f"a JSON {type(value).__name__}, not an object")
        return value


class DelimitedFile(TextFile):
    """CSV or, by the suffix, TSV: a header, then rows of as many columns; quoted fields may hold line ends."""

    def __init__(self, path: Path, text: str, label: str) -> None:
        super().__init__(path, text, label)
        self.delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        with open(path, "rb") as file:
            _skip_mark(file)  # before a quote that may follow it
            reader = LineReader(file)
            try:
                header = self._fields(reader)
            except BadRow as error:
                raise ExperimentError(f"{path}: the header cannot be read: {error}") from None
        if not header:
            raise ExperimentError(f"{path} has no header")
        self.start = reader.position
        self.columns = header
        self.places = []
        for name, flag in ((text, "--text"), (label, "--label")):
            if self.columns.count(name) != 1:
                what = "no such column" if name not in self.columns else "two columns of that name"
                raise ExperimentError(f"{flag} {name}: {path} has {what}; its columns are {', '.join(self.columns)}")
            self.places.append(self.columns.index(name))

    def _next(self, reader: LineReader) -> tuple[Any, Any] | None:
        fields = self._fields(reader)
        if fields is None:
            return None
        if not fields:
            raise BadRow("empty line")
        if len(fields) != len(self.columns):
            raise BadRow(f"{len(fields)} columns where the header has {len(self.columns)}")
        return fields[self.places[0]], fields[self.places[1]]

    def _fields(self, reader: LineReader) -> list[str] | None:
        try:
            return next(csv.reader(reader, delimiter=self.delimiter, strict=True), None)
        except csv.Error as error:
            raise TornRow(f"broken quoting ({error})") from None
