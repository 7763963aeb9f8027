"""Which reader a file gets, by the end of its name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from ..common.errors import ExperimentError
from .lines import DelimitedFile, JsonLinesFile
from .parquet import ParquetFile
from .rows import RowFile

READERS: dict[str, Callable[[Path, str, str], RowFile]] = {
    ".jsonl": JsonLinesFile,
    ".ndjson": JsonLinesFile,
    ".csv": DelimitedFile,
    ".tsv": DelimitedFile,
    ".parquet": ParquetFile,
}


def format_of(flag: str, path: Path) -> str:
    """The end of the name, if it is that of a known format."""
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise ExperimentError(f"{flag} {path}: the name must end in {', '.join(READERS)}")
    return suffix


def open_rows(flag: str, path: Path, text: str, label: str) -> RowFile:
    """A reader of the file that ``flag`` names."""
    suffix = format_of(flag, path)
    if not path.is_file():
        raise ExperimentError(f"{flag} {path}: no such file")
    if path.stat().st_size == 0:
        raise ExperimentError(f"{flag} {path}: the file is empty")
    return READERS[suffix](path, text, label)


def out_file(flag: str, path: Path) -> Path:
    """A file to write, whose folder must be there."""
    if not path.parent.is_dir():
        raise ExperimentError(f"{flag} {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise ExperimentError(f"{flag} {path}: is a folder; name a file")
    if not os.access(path.parent, os.W_OK):
        raise ExperimentError(f"{flag} {path}: the folder {path.parent} cannot be written to")
    return path


def digest(path: Path) -> str:
    """A fingerprint of the file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
