"""The shipped movie-review snippets with human sentiment ratings, weakly labelled by lexicons."""

from __future__ import annotations

import csv
import gzip
from importlib import resources

import torch
from torch import Tensor

from .lexicons import VOTERS, lexicon_votes
from .weak_dataset import Split, WeakDataset

NEUTRAL = 0.3  # mean ratings up to this size (on a scale of -4 to 4) are neither praise nor blame and are left out
CLEAR_SNIPPETS = 10311  # that are left
TEST_SIZE = 2000
DEV_SIZE = 2000
SPLIT_SEED = 1234


def read_snippets() -> tuple[list[str], list[float]]:
    """All 10,605 snippets and their mean human rating."""
    archive = resources.files(__package__).joinpath("movie_reviews.tsv.gz").read_bytes()
    rows = list(csv.DictReader(gzip.decompress(archive).decode().splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row["text"] for row in rows], [float(row["mean_rating"]) for row in rows]


def clear_snippets(limit: int | None = None) -> tuple[list[str], Tensor]:
    """The first ``limit`` snippets of clear praise or blame, in an order that is always the same, and their ratings."""
    texts, ratings = read_snippets()
    rating = torch.tensor(ratings)
    clear = (rating.abs() > NEUTRAL).nonzero().squeeze(1)
    order = clear[torch.randperm(len(clear), generator=torch.Generator().manual_seed(SPLIT_SEED))][:limit]
    return [texts[i] for i in order.tolist()], rating[order]


def split_places(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the test, dev and train texts among so many clear snippets; of fewer, the same proportions."""
    test_size, dev_size = TEST_SIZE * count // CLEAR_SNIPPETS, DEV_SIZE * count // CLEAR_SNIPPETS
    test, dev, train = torch.split(torch.arange(count), [test_size, dev_size, count - test_size - dev_size])
    return test, dev, train


def load_reviews(limit: int | None = None) -> WeakDataset:
    """Praise (1) or blame (0) in movie reviews; the splits are the same in every run.

    Args:
        limit: use only this many snippets, in the same proportions (for quick trials).
    """
    texts, rating = clear_snippets(limit)
    test, dev, train = split_places(len(texts))
    votes, scores = lexicon_votes(texts)
    everything = Split(texts, (rating > 0).long(), votes, scores)
    return WeakDataset(
        name="movie reviews",
        classes=["negative", "positive"],
        voters=VOTERS,
        test=everything.select(test),
        dev=everything.select(dev),
        train=everything.select(train),
        random_ties=False,
    )
