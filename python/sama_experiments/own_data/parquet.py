"""Parquet, through pyarrow, a batch of rows at a time."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..common.errors import ExperimentError
from .rows import BadRow, Record, label_of, text_of

BATCH = 256  # rows in memory at a time
ROW_GROUP = 16 << 20  # bytes, not compressed, of the row groups that are written


def arrow(module: str = "pyarrow") -> Any:
    """A module of pyarrow, which only Parquet needs."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ExperimentError("Parquet files need the package pyarrow: pip install pyarrow") from error


def opened(path: Path) -> Any:
    """A pyarrow ParquetFile that reads no further ahead than it must."""
    # Arrow's default pool gives freed memory back late: reading a file of 140 MB took 39 MiB with it, 21 with this one.
    arrow().set_memory_pool(arrow().system_memory_pool())
    try:
        return arrow("pyarrow.parquet").ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (arrow().ArrowInvalid, OSError) as error:
        raise ExperimentError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from error


class ParquetFile:
    """A Parquet file with a column of texts and one of labels."""

    def __init__(self, path: Path, text: str, label: str) -> None:
        self.path = path
        self.text = text
        self.label = label
        with opened(path) as file:
            names = file.schema_arrow.names
        for name, flag in ((text, "--text"), (label, "--label")):
            if name not in names:
                raise ExperimentError(f"{flag} {name}: {path} has no such column; its columns are {', '.join(names)}")
            if names.count(name) > 1:
                raise ExperimentError(f"{flag} {name}: {path} has {names.count(name)} columns of this name")

    def scan(self) -> Iterator[Record]:
        """All rows, in order."""
        row = 0
        with opened(self.path) as file:
            for batch in file.iter_batches(BATCH, columns=[self.text, self.label]):
                pairs = zip(batch[self.text].to_pylist(), batch[self.label].to_pylist(), strict=True)
                for text, label in pairs:
                    try:
                        yield Record(row, None, -1, b"", text_of(text, self.text), label_of(label, self.label), None)
                    except BadRow as error:
                        yield Record(row, None, -1, b"", "", "", str(error))
                    row += 1

    def copy(self, out: Path, keep: bytearray) -> None:
        """Write the rows to keep, all columns, under the same schema."""
        pa = arrow()
        with opened(self.path) as file, arrow("pyarrow.parquet").ParquetWriter(out, file.schema_arrow) as kept:
            row, waiting = 0, []
            for batch in file.iter_batches(BATCH):
                waiting.append(batch.filter(pa.array([flag != 0 for flag in keep[row : row + len(batch)]])))
                row += len(batch)
                if sum(part.nbytes for part in waiting) > ROW_GROUP:
                    kept.write_table(pa.Table.from_batches(waiting))
                    waiting = []
            if waiting:
                kept.write_table(pa.Table.from_batches(waiting))
