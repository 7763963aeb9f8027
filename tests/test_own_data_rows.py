"""Reading a user's files: which rows are good, where they are, and what is said of the others."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sama_experiments.common.errors import ExperimentError
from sama_experiments.own_data import lines
from sama_experiments.own_data.formats import open_rows
from sama_experiments.own_data.index import BadRows, RowIndex, read_clean
from sama_experiments.own_data.rows import BadRow, Record, label_of


def scanned(path: Path) -> list[Record]:
    return list(open_rows("--train", path, "text", "label").scan())


def test_json_lines_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    content = [
        b'\xef\xbb\xbf{"text": "one", "label": 1}\n',  # a byte order mark is not part of the row
        b'{"label": "1", "text": "zwei \xc3\xbc", "more": [1]}\r\n',
        b"\n",
        b'{"text": "three"\n',
        b'[{"text": "four", "label": 1}]\n',
        b'{"text": "five"}\n',
        b'{"text": null, "label": 1}\n',
        b'{"text": "  ", "label": 1}\n',
        b'{"text": 6, "label": 1}\n',
        b'{"text": "seven", "label": 1.5}\n',
        b'{"text": "eight \xff", "label": 1}\n',
        b'{"text": "nine \\ud800", "label": 1}\n',
        b'{"text": "ten", "label": true}\n',
        b'{"text": "eleven", "label": 2.0}',
    ]
    path.write_bytes(b"".join(content))
    records = scanned(path)
    assert [(r.row, r.line) for r in records] == [(i, i + 1) for i in range(14)]
    assert [r.problem and r.problem.partition(" (")[0] for r in records] == [
        None,
        None,
        "empty line",
        "broken JSON",
        "a JSON list, not an object",
        "no label",
        "no text",
        "text is blank",
        "text is a int, not a string",
        "label is neither a string nor an integer",
        "not UTF-8",
        "text holds half a character",
        None,
        None,
    ]
    good = [r for r in records if r.problem is None]
    assert [(r.text, r.label) for r in good] == [("one", "1"), ("zwei ü", "1"), ("ten", "true"), ("eleven", "2")]
    assert b"".join(r.raw for r in records) == path.read_bytes()[3:]


CSV = (
    b"id,text,label\r\n"
    b'1,"a, ""quoted"" text",x\r\n'
    b'2,"two\nlines",y\r\n'
    b"3,short\r\n"
    b'4,"closed" badly,x\r\n'
    b"\r\n"
    b'5,"never closed,x\r\n'
    b"6,good again,y\r\n"
    b"7,bad \xff byte,y\r\n"
    b"8,last,x"
)


def test_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(CSV)
    records = scanned(path)
    assert [r.line for r in records] == [2, 3, 5, 6, 7, 8, 9, 10, 11]
    assert [r.problem and r.problem.partition(" (")[0] for r in records] == [
        None,
        None,
        "2 columns where the header has 3",
        "broken quoting",
        "empty line",
        "broken quoting",
        None,
        "not UTF-8",
        None,
    ]
    assert [(r.text, r.label) for r in records if r.problem is None] == [
        ('a, "quoted" text', "x"),
        ("two\nlines", "y"),
        ("good again", "y"),
        ("last", "x"),
    ]
    assert CSV.endswith(b"".join(r.raw for r in records))  # an open quote costs one row, not the rest of the file


@pytest.mark.parametrize("header", [b"text\tlabel", b'"text"\t"label"'], ids=["plain", "quoted"])
def test_tsv_and_byte_order_mark(tmp_path: Path, header: bytes) -> None:
    """As pandas writes it with encoding="utf-8-sig", also with quoting=csv.QUOTE_ALL."""
    path = tmp_path / "rows.TSV"
    path.write_bytes(b"\xef\xbb\xbf" + header + b"\na, b\tx\n")
    assert [(r.text, r.label) for r in scanned(path)] == [("a, b", "x")]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_line_without_end_is_one_bad_row(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE", 1 << 20)
    path = tmp_path / name
    good = b'{"text": "a", "label": 1}\n' if name == "rows.jsonl" else b"a,1\n"
    head = b"" if name == "rows.jsonl" else b"text,label\n"
    path.write_bytes(head + good + b"x" * (3 << 20) + b"\n" + good)
    records = scanned(path)
    assert [r.problem for r in records] == [None, "a line of more than 1 MiB", None]
    assert len(records[1].raw) == 1 << 20


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table(columns), path, **options)


def test_parquet_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    columns = {"text": ["one", None, "three", ""], "label": [1, 2, None, 3], "more": [[1], [2], [3], [4]]}
    write_parquet(path, columns, row_group_size=3)
    records = scanned(path)
    assert [(r.text, r.label, r.problem) for r in records] == [
        ("one", "1", None),
        ("", "", "no text"),
        ("", "", "no label"),
        ("", "", "no text"),
    ]
    open_rows("--train", path, "text", "label").copy(tmp_path / "kept.parquet", bytearray([1, 0, 0, 1]))
    parquet = pytest.importorskip("pyarrow.parquet")
    kept = parquet.read_table(tmp_path / "kept.parquet")
    assert kept.to_pydict() == {"text": ["one", ""], "label": [1, 3], "more": [[1], [4]]}
    assert kept.schema == parquet.read_schema(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_rows_are_found_again_in_any_order(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    texts = [f'text {i}\nwith ü, "quotes" and {"x" * (i % 7)}' for i in range(2500)]
    labels = ["no" if i % 3 else "yes" for i in range(2500)]
    labels[5] = "maybe"
    if name == "rows.jsonl":
        path.write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in zip(texts, labels, strict=True)))
    elif name == "rows.csv":
        quoted = [t.replace('"', '""') for t in texts]
        rows = "".join(f'"{t}",{n}\n' for t, n in zip(quoted, labels, strict=True))
        path.write_text("text,label\n" + rows)
    else:
        write_parquet(path, {"text": texts, "label": labels})
    with open(tmp_path / "bad.jsonl", "w") as listed:
        bad = BadRows(listed)
        spool = tmp_path / "spool.jsonl"
        index = RowIndex(open_rows("--train", path, "text", "label"), ["no", "yes"], bad, spool)
    assert index.total == 2500 and len(index) == 2499 and 5 not in index.rows.tolist()
    assert bad.of(path) == {"a label that is not among the classes of --clean": 1}
    entry = json.loads((tmp_path / "bad.jsonl").read_text())
    assert entry["row"] == 5 and entry["reason"].endswith("(maybe)") and entry["content"]
    places = torch.randperm(2499, generator=torch.Generator().manual_seed(0))[:300]
    assert index.texts(places) == [texts[row] for row in index.rows[places].tolist()]
    assert [["no", "yes"][i] for i in index.labels.tolist()] == [labels[row] for row in index.rows.tolist()]
    assert index.lengths[places].tolist() == [len(text) for text in index.texts(places)]


def test_kept_rows_are_the_same_bytes(tmp_path: Path) -> None:
    path, out = tmp_path / "rows.csv", tmp_path / "kept.csv"
    path.write_bytes(CSV)
    open_rows("--train", path, "text", "label").copy(out, bytearray([0, 1, 0, 0, 0, 0, 1, 0, 1]))
    assert out.read_bytes() == b'id,text,label\r\n2,"two\nlines",y\r\n6,good again,y\r\n8,last,x'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b"[]", "--train rows.json: the name must end in .jsonl, .ndjson, .csv, .tsv, .parquet"),
        ("rows.csv", b"", "--train rows.csv: the file is empty"),
        ("rows.csv", b"a,label\n", "--text text: rows.csv has no such column; its columns are a, label"),
        ("rows.csv", b"text,label,text\n", "--text text: rows.csv has two columns of that name"),
        ("rows.csv", b'"text,label\n', "rows.csv: the header cannot be read: broken quoting"),
        (
            "rows.jsonl",
            b'{"text": 1}\n{"klass": 1}\n',
            "--label label: rows.jsonl has no such field; its fields are te",
        ),
        ("rows.parquet", b"text,label\n", "rows.parquet is not a Parquet file: "),
    ],
)
def test_files_that_are_refused(
    name: str, content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(ExperimentError) as caught:
        open_rows("--train", Path(name), "text", "label")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_parquet_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write_parquet(path, {"body": ["a"], "label": [1]})
    with pytest.raises(ExperimentError, match=r"--text text: .* has no such column; its columns are body, label"):
        open_rows("--train", path, "text", "label")


def test_parquet_columns_are_told_apart(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array([1])], ["text", "text", "label"]), path
    )
    with pytest.raises(ExperimentError, match=r"--text text: .* has 2 columns of this name"):
        open_rows("--train", path, "text", "label")


@pytest.mark.parametrize(
    ("value", "name"),
    [(1, "1"), (1.0, "1"), ("1", "1"), ("-1.0", "-1"), ("1.5", "1.5"), (False, "false"), ("a b", "a b")],
)
def test_labels_are_strings(value: object, name: str) -> None:
    assert label_of(value, "label") == name


@pytest.mark.parametrize("value", [None, "", 0.5, float("nan"), float("inf"), [1], {}, "\ud83d"])
def test_labels_that_are_none(value: object) -> None:
    with pytest.raises(BadRow):
        label_of(value, "label")


def test_the_clean_set_has_two_classes(tmp_path: Path) -> None:
    for content, message in (("a,x\nb,x\n", "only the class 'x'"), (",x\n", r"no good row \(most often: no text\)")):
        path = tmp_path / "clean.csv"
        path.write_text("text,label\n" + content)
        with open(tmp_path / "bad.jsonl", "w") as listed, pytest.raises(ExperimentError, match=message):
            read_clean(open_rows("--clean", path, "text", "label"), BadRows(listed))


MEASURE = """
import sys
from pathlib import Path
import torch
from sama_experiments.own_data.formats import open_rows
from sama_experiments.own_data import parquet
from sama_experiments.own_data.index import BadRows, RowIndex

parquet.ROW_GROUP = 1 << 20

def peak():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

path = Path(sys.argv[1])
rows = open_rows("--train", path, "text", "label")
next(iter(rows.scan()))
before = peak()
with open(path.with_suffix(".bad"), "w") as listed:
    index = RowIndex(rows, ["0", "1"], BadRows(listed), path.with_suffix(".spool"))
order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
for places in order[:6400].split(64):
    assert all(len(text) == 2400 for text in index.texts(places))
rows.copy(path.with_suffix(".kept"), bytearray([1]) * index.total)
print(len(index), peak() - before)
"""


def many_json_lines(path: Path, count: int) -> None:
    with open(path, "w") as file:
        for i in range(count):
            file.write(
                json.dumps({"text": f"{i:05d} " * 400, "label": i % 2})[:-1] + ', "pad": "' + "y" * 1000 + '"}\n'
            )


def many_parquet(path: Path, count: int) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    schema = pa.schema([("text", pa.string()), ("label", pa.int64())])
    with parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as file:
        for start in range(0, count, 5000):
            numbers = range(start, start + 5000)
            columns = {"text": [f"{i:05d} " * 400 for i in numbers], "label": [i % 2 for i in numbers]}
            file.write_table(pa.table(columns, schema=schema))


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak of the memory from /proc")
@pytest.mark.parametrize(
    ("name", "write", "count", "limit"),
    [("rows.jsonl", many_json_lines, 20_000, 12), ("rows.parquet", many_parquet, 40_000, 64)],
)
def test_memory_does_not_grow_with_the_file(
    name: str, write: Callable[[Path, int], None], count: int, limit: int, tmp_path: Path
) -> None:
    """Files of 66 and 92 MiB; measured with files twice as large: 7 and 44 MiB, hardly more than with these."""
    path = tmp_path / name
    write(path, count)
    size = path.stat().st_size
    assert size > 45 << 20
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows, growth = map(int, done.stdout.split())
    assert rows == count and growth < limit << 20, f"{growth >> 20} MiB for a file of {size >> 20} MiB"
    print(f"{name}: {growth / 2**20:.1f} MiB for a file of {size / 2**20:.0f} MiB")
