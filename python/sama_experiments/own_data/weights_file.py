"""The file of weights, in Parquet, CSV or JSON Lines, and the summary beside it."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import ExperimentError
from .parquet import arrow, opened

FORMATS = (".parquet", ".csv", ".jsonl")
CLASS_COLUMNS = ("label", "proposed_label", "corrected_label")
TYPES = {"row": torch.int64, "suspected": torch.bool} | dict.fromkeys(CLASS_COLUMNS, torch.int32)
ROWS = 1 << 16  # written and read together


def check_name(flag: str, path: Path) -> None:
    """Raise unless the end of the name is that of a known format."""
    if path.suffix.lower() not in FORMATS:
        raise ExperimentError(f"{flag} {path}: the name must end in {', '.join(FORMATS)}")


def write(path: Path, classes: list[str], columns: dict[str, Tensor]) -> None:
    """Write columns of one length, [N] each; classes by their names."""
    partial = partial_file(path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        _write_parquet(partial, classes, columns)
    else:
        with open(partial, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            if suffix == ".csv":
                table.writerow(columns)
            for part in _parts(classes, columns):
                rows = zip(*part.values(), strict=True)
                if suffix == ".csv":
                    table.writerows(rows)
                else:
                    file.writelines(
                        json.dumps(dict(zip(part, row, strict=True)), ensure_ascii=False) + "\n" for row in rows
                    )
    os.replace(partial, path)


def read(path: Path, classes: list[str], names: list[str]) -> dict[str, Tensor]:
    """Some columns of such a file; those of classes as places in ``classes``, int32, and numbers as float32."""
    number = {name: i for i, name in enumerate(classes)}
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    try:
        for part in _read_parts(path, names):
            for name in names:
                values: list[Any] = part[name]
                if name in CLASS_COLUMNS:
                    values = [number[value] for value in values]
                elif isinstance(values[0], str):
                    values = [value == "True" if name == "suspected" else float(value) for value in values]
                parts[name].append(torch.tensor(values, dtype=TYPES.get(name, torch.float32)))
    except (KeyError, ValueError, TypeError) as error:
        raise ExperimentError(f"--weights {path}: is not a file that `sama-kernels weigh` wrote ({error})") from error
    return {name: torch.cat(values) for name, values in parts.items()}


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Beside the weights: what they were made from, and how."""
    summary_file(path).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_summary(path: Path) -> dict[str, Any]:
    """What ``write_summary`` wrote."""
    file = summary_file(path)
    if not path.is_file():
        raise ExperimentError(f"--weights {path}: no such file")
    if not file.is_file():
        raise ExperimentError(f"--weights {path}: {file}, which `sama-kernels weigh` wrote beside it, is missing")
    try:
        summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExperimentError(f"{file} is not a file that `sama-kernels weigh` wrote ({error})") from error
    return summary


def summary_file(path: Path) -> Path:
    """Where `weigh` puts what it says of its weights."""
    return Path(f"{path}.json")


def partial_file(path: Path) -> Path:
    """What is written before it takes the place of `path`."""
    return Path(f"{path}.partial")


def _parts(classes: list[str], columns: dict[str, Tensor]) -> Iterator[dict[str, list[Any]]]:
    """The columns, so many rows at a time, as lists."""
    for start in range(0, len(columns["row"]), ROWS):
        part: dict[str, list[Any]] = {}
        for name, column in columns.items():
            values = column[start : start + ROWS].tolist()
            if name in CLASS_COLUMNS:
                values = [classes[value] for value in values]
            elif column.is_floating_point():
                values = [float(f"{value:.7g}") for value in values]
            part[name] = values
        yield part


def _write_parquet(path: Path, classes: list[str], columns: dict[str, Tensor]) -> None:
    pa = arrow()
    types = {torch.int64: pa.int64(), torch.int32: pa.string(), torch.bool: pa.bool_(), torch.float32: pa.float32()}
    schema = pa.schema([(name, types[column.dtype]) for name, column in columns.items()])
    with arrow("pyarrow.parquet").ParquetWriter(path, schema) as file:
        for part in _parts(classes, columns):
            file.write_table(pa.table(part, schema=schema))


def _read_parts(path: Path, names: list[str]) -> Iterator[dict[str, list[Any]]]:
    check_name("--weights", path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        with opened(path) as file:
            for batch in file.iter_batches(ROWS, columns=names):
                yield batch.to_pydict()
        return
    with open(path, encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines) if suffix == ".csv" else map(json.loads, lines)
        part: dict[str, list[Any]] = {name: [] for name in names}
        for row in rows:
            for name in names:
                part[name].append(row[name])
            if len(part[names[0]]) == ROWS:
                yield part
                part = {name: [] for name in names}
        if part[names[0]]:
            yield part
