"""The shipped movie-review snippets with human sentiment ratings, weakly labelled by lexicons."""

from __future__ import annotations

import csv
import gzip
from importlib import resources

import torch

from .lexicons import VOTERS, lexicon_votes
from .weak_dataset import Split, WeakDataset

NEUTRAL = 0.3  # mean ratings up to this size (on a scale of -4 to 4) are neither praise nor blame and are left out
TEST_SIZE = 2000
DEV_SIZE = 2000
SPLIT_SEED = 1234


def read_snippets() -> tuple[list[str], list[float]]:
    """All 10,605 snippets and their mean human rating."""
    archive = resources.files(__package__).joinpath("movie_reviews.tsv.gz").read_bytes()
    rows = list(csv.DictReader(gzip.decompress(archive).decode().splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row["text"] for row in rows], [float(row["mean_rating"]) for row in rows]


def load_reviews(limit: int | None = None) -> WeakDataset:
    """Praise (1) or blame (0) in movie reviews; the splits are the same in every run.

    Args:
        limit: use only this many snippets, in the same proportions (for quick trials).
    """
    texts, ratings = read_snippets()
    rating = torch.tensor(ratings)
    clear = (rating.abs() > NEUTRAL).nonzero().squeeze(1)
    order = clear[torch.randperm(len(clear), generator=torch.Generator().manual_seed(SPLIT_SEED))]
    test_size, dev_size = TEST_SIZE, DEV_SIZE
    if limit is not None and limit < len(order):
        test_size, dev_size = test_size * limit // len(order), dev_size * limit // len(order)
        order = order[:limit]
    chosen = [texts[i] for i in order.tolist()]
    votes, scores = lexicon_votes(chosen)
    everything = Split(chosen, (rating[order] > 0).long(), votes, scores)
    place = torch.arange(len(order))
    return WeakDataset(
        name="movie reviews",
        classes=["negative", "positive"],
        voters=VOTERS,
        test=everything.select(place[:test_size]),
        dev=everything.select(place[test_size : test_size + dev_size]),
        train=everything.select(place[test_size + dev_size :]),
        random_ties=False,
    )
