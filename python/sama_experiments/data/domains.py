"""The embedded default of continued pretraining: movie reviews, and text of four domains beside them."""

from __future__ import annotations

import csv
import gzip
from importlib import resources

import torch

from ..common.errors import ExperimentError
from .reviews import clear_snippets, split_places
from .text_dataset import LabelledTexts, TextDataset

OWN_DOMAIN = "movies"
SHUFFLE_SEED = 1234
TRAIN_SIZE = 1500  # texts that labels can be drawn from


def read_other_domains() -> dict[str, list[str]]:
    """The shipped texts by domain: 3,708 of amazon, 5,190 of nyt, 4,200 of tweets."""
    archive = resources.files(__package__).joinpath("other_domains.tsv.gz").read_bytes()
    found: dict[str, list[str]] = {}
    for row in csv.DictReader(gzip.decompress(archive).decode().split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE):
        found.setdefault(row["domain"], []).append(row["text"])
    return found


def load_reviews_among_domains(per_domain: int, limit: int | None = None) -> TextDataset:
    """Praise or blame in movie reviews; auxiliary text: ``per_domain`` texts each of movies, amazon, nyt and tweets.

    The movie texts among them are of the train split, and the train texts with labels are others: what a method learns
    from in-domain text it has not from the task's own texts.
    """
    texts, rating = clear_snippets(limit)
    everything = LabelledTexts(texts, (rating > 0).long())
    test, dev, train = split_places(len(texts))
    # a few snippets stand in the data twice; the first one counts, and the test split comes first
    first = {text: place for place, text in reversed(list(enumerate(texts)))}
    dev, train = (torch.tensor([p for p in places.tolist() if first[texts[p]] == p]) for places in (dev, train))
    own, labelled = train[:per_domain], train[per_domain : per_domain + TRAIN_SIZE]
    if len(labelled) == 0:
        raise ExperimentError(f"--per-domain {per_domain}: there are only {len(train)} movie texts for training")
    auxiliary = {OWN_DOMAIN: _select(everything, own).texts}
    generator = torch.Generator().manual_seed(SHUFFLE_SEED)
    for domain, found in read_other_domains().items():
        if per_domain > len(found):
            raise ExperimentError(f"--per-domain {per_domain}: {domain} has only {len(found)} texts")
        order = torch.randperm(len(found), generator=generator)[:per_domain]
        auxiliary[domain] = [found[i] for i in order.tolist()]
    return TextDataset(
        name="movie reviews",
        classes=["negative", "positive"],
        train=_select(everything, labelled),
        dev=_select(everything, dev),
        test=_select(everything, test),
        auxiliary=auxiliary,
    )


def _select(given: LabelledTexts, places: torch.Tensor) -> LabelledTexts:
    return LabelledTexts([given.texts[i] for i in places.tolist()], given.labels[places])
