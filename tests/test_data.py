"""Loading of the shipped reviews and of WRENCH folders, and the votes on them."""

import json

import pytest
import torch

from sama_experiments.common.errors import ExperimentError
from sama_experiments.data import ABSTAIN, load_reviews, load_wrench, majority_vote, vote_features
from sama_experiments.data.reviews import read_snippets


def wrench_split(count: int) -> dict:
    return {
        str(i): {"data": {"text": f"text {i}"}, "label": i % 3, "weak_labels": [i % 3, -1, (i + 1) % 3]}
        for i in range(count)
    }


@pytest.fixture
def wrench_folder(tmp_path):
    for name, count in (("train", 9), ("valid", 6), ("test", 5)):
        (tmp_path / f"{name}.json").write_text(json.dumps(wrench_split(count)))
    (tmp_path / "label.json").write_text(json.dumps({"0": "a", "1": "b", "2": "c"}))
    return tmp_path


def test_all_shipped_snippets_are_read():
    texts, ratings = read_snippets()
    assert len(texts) == len(ratings) == 10605
    assert all(texts) and not any(ord(c) == 0xFFFD for text in texts for c in text)
    assert min(ratings) >= -4 and max(ratings) <= 4 and min(ratings) < -3 < 3 < max(ratings)
    assert texts[2] == "Effective but too tepid biopic" and ratings[2] == -0.6


def test_review_splits_are_fixed_and_disjoint():
    first, again = load_reviews(limit=300), load_reviews(limit=300)
    assert first.test.texts == again.test.texts and first.dev.texts == again.dev.texts
    everything = first.train.texts + first.dev.texts + first.test.texts
    assert len(everything) == len(set(everything)) == 300
    accuracy, coverage = first.weak_label_quality()
    assert 0.55 < accuracy < 0.8 and 0.8 < coverage < 1
    signals = first.signals()
    assert (
        signals.shape == (len(first.train), 3 + 3 * 2 + 2 + 2) and signals.isfinite().all() and signals.abs().max() <= 1
    )


def test_lexicons_know_praise_from_blame():
    from sama_experiments.data.lexicons import lexicon_votes

    votes, scores = lexicon_votes(["a wonderful, great film", "a terrible, bad film", "the table of the carpenter", ""])
    assert votes.tolist() == [[1, 1, 1], [0, 0, 0], [ABSTAIN] * 3, [ABSTAIN] * 3]
    assert scores.shape == (4, 3) and (scores[2:] == 0).all()


def test_majority_vote_and_ties():
    votes = torch.tensor([[1, 1, 0], [0, -1, -1], [-1, -1, -1], [0, 1, -1], [2, 2, 1]])
    assert majority_vote(votes, 3).tolist() == [1, 0, ABSTAIN, ABSTAIN, 2]
    drawn = {majority_vote(votes, 3, torch.Generator().manual_seed(s))[3].item() for s in range(20)}
    assert drawn == {0, 1}
    settled = majority_vote(votes, 3, torch.Generator().manual_seed(0))
    assert settled[[0, 1, 2, 4]].tolist() == [1, 0, ABSTAIN, 2]


def test_vote_features_show_agreement():
    features = vote_features(torch.tensor([[1, 1, -1], [0, 1, -1], [-1, -1, -1]]), 2)
    assert features.shape == (3, 3 * 2 + 2 + 2)
    share, turnout, lead = features[:, 6:8], features[:, 8], features[:, 9]
    assert share.tolist() == [[0, 1], [0.5, 0.5], [0, 0]]
    torch.testing.assert_close(turnout, torch.tensor([2 / 3, 2 / 3, 0]))
    assert lead.tolist() == [1, 0, 0]


def test_wrench_folder(wrench_folder):
    data = load_wrench(wrench_folder)
    assert data.classes == ["a", "b", "c"] and data.name == wrench_folder.name
    assert [len(split) for split in (data.train, data.dev, data.test)] == [9, 6, 5]
    assert data.train.votes[1].tolist() == [1, -1, 2] and data.test.labels.tolist() == [0, 1, 2, 0, 1]
    assert torch.equal(data.weak_labels(), data.weak_labels())
    assert data.weak_label_quality()[1] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["1"].pop("label"), 'record 1: no field "label"'),
        (lambda r: r["1"].pop("weak_labels"), 'no field "weak_labels"'),
        (lambda r: r["1"]["data"].pop("text"), 'no field "text"'),
        (lambda r: r["1"].update(label=7), "label 7 is not one of the 3 classes"),
        (lambda r: r["1"].update(weak_labels=[0, 1]), "2 weak_labels, expected 3"),
        (lambda r: r["1"].update(weak_labels=[0, 1, 9]), "class numbers and -1"),
        (lambda r: r.clear(), "not empty"),
    ],
)
def test_wrench_errors_name_file_and_field(wrench_folder, change, message):
    records = wrench_split(4)
    change(records)
    (wrench_folder / "valid.json").write_text(json.dumps(records))
    with pytest.raises(ExperimentError, match=r"valid\.json") as caught:
        load_wrench(wrench_folder)
    assert message in str(caught.value)


def test_wrench_missing_folder_file_and_broken_json(wrench_folder):
    with pytest.raises(ExperimentError, match="no data folder"):
        load_wrench(wrench_folder / "nowhere")
    (wrench_folder / "test.json").write_text("{")
    with pytest.raises(ExperimentError, match="not valid JSON"):
        load_wrench(wrench_folder)
    (wrench_folder / "test.json").unlink()
    with pytest.raises(ExperimentError, match=r"no file .*test\.json"):
        load_wrench(wrench_folder)
