"""Loading of folders in the format of "Don't stop pretraining", of auxiliary text, and of the shipped domains."""

import json

import pytest

from sama_experiments.common.errors import ExperimentError
from sama_experiments.data import load_classification, load_reviews_among_domains
from sama_experiments.data.classification import load_texts
from sama_experiments.data.domains import TRAIN_SIZE, read_other_domains


def lines(records: list) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def records(count: int, labels=("COMPARE", "USED-FOR", "PART-OF")) -> list[dict]:
    return [{"text": f"text\u2028{i}", "label": labels[i % len(labels)], "metadata": {}} for i in range(count)]


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "sciie"
    data.mkdir()
    for split, count in (("train", 7), ("dev", 4), ("test", 5)):
        (data / f"{split}.jsonl").write_text(lines(records(count)))
    return data


def test_folder(folder):
    data = load_classification(folder)
    assert data.name == "sciie" and data.classes == ["COMPARE", "PART-OF", "USED-FOR"]
    assert [len(split) for split in (data.train, data.dev, data.test)] == [7, 4, 5]
    assert data.train.labels.tolist() == [0, 2, 1, 0, 2, 1, 0] and data.test.texts[4] == "text\u20284"
    assert data.auxiliary == {"task": data.train.texts}


@pytest.mark.parametrize("labels", [(True, False), ("true", "false"), (0, 1)])
def test_labels_of_all_kinds(folder, labels):
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_text(lines(records(4, labels)) + "\n")
    data = load_classification(folder)
    assert data.classes == sorted(map(str, labels)) and len(data.train) == 4


def test_auxiliary_files_are_domains(folder, tmp_path):
    (tmp_path / "news.txt").write_text("one\n\n  two \n")
    (tmp_path / "papers.jsonl").write_text(lines([{"text": "three"}, {"text": " "}]))
    data = load_classification(folder, [str(tmp_path / "news.txt"), str(tmp_path / "papers.jsonl")])
    assert list(data.auxiliary) == ["task", "news", "papers"]
    assert data.auxiliary["news"] == ["one", "two"] and data.auxiliary["papers"] == ["three"]
    with pytest.raises(ExperimentError, match="'news' already"):
        load_classification(folder, [str(tmp_path / "news.txt")] * 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1 is not valid JSON"),
        ("[1]\n", "line 1: expected a JSON object"),
        (lines([{"label": "COMPARE"}]), 'line 1: no field "text"'),
        (lines([*records(1), {"text": "a"}]), 'line 2: no field "label"'),
        (lines([{"text": "a", "label": [1]}]), "neither a string nor an integer"),
        (lines([{"text": "a", "label": "NEW"}]), "label 'NEW' is not in train.jsonl"),
        ("\n", "holds no texts"),
    ],
)
def test_errors_name_file_and_line(folder, content, message):
    (folder / "dev.jsonl").write_text(content)
    with pytest.raises(ExperimentError, match=r"dev\.jsonl") as caught:
        load_classification(folder)
    assert message in str(caught.value)


def test_missing_files_and_single_class(folder, tmp_path):
    with pytest.raises(ExperimentError, match=r"--data .*nowhere: no such folder"):
        load_classification(folder / "nowhere")
    (folder / "test.jsonl").unlink()
    with pytest.raises(ExperimentError, match=r"test\.jsonl: No such file"):
        load_classification(folder)
    (folder / "train.jsonl").write_text(lines(records(3, ("A",))))
    (folder / "test.jsonl").write_text(lines(records(3, ("A",))))
    (folder / "dev.jsonl").write_text(lines(records(3, ("A",))))
    with pytest.raises(ExperimentError, match="1 class"):
        load_classification(folder)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ExperimentError, match="holds no text"):
        load_texts(tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ExperimentError, match="not UTF-8"):
        load_texts(tmp_path / "binary.txt")


def test_shipped_domains():
    found = read_other_domains()
    assert {domain: len(texts) for domain, texts in found.items()} == {"amazon": 3708, "nyt": 5190, "tweets": 4200}
    assert all(text.strip() == text and text for texts in found.values() for text in texts)
    assert found["amazon"][0] == "troubleshooting ad-2500 and ad-2600 no picture scrolling b/w."
    assert found["tweets"][1] == "Yay. Another good phone interview."


def test_reviews_among_domains_share_no_text_between_splits():
    data = load_reviews_among_domains(300)
    assert list(data.auxiliary) == ["movies", "amazon", "nyt", "tweets"]
    assert all(len(texts) == 300 for texts in data.auxiliary.values()) and len(data.train) == TRAIN_SIZE
    movies = [data.train.texts, data.dev.texts, data.test.texts, data.auxiliary["movies"]]
    assert len({text for texts in movies for text in texts}) == sum(map(len, movies))
    assert data.auxiliary == load_reviews_among_domains(300).auxiliary
    with pytest.raises(ExperimentError, match="amazon has only 3708"):
        load_reviews_among_domains(4000)
    with pytest.raises(ExperimentError, match="movie texts for training"):
        load_reviews_among_domains(300, limit=200)
