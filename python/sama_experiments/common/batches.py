"""Batches of texts in random order, each of texts of about one length, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TOGETHER = 8  # batches that are sorted by length together


def one_epoch(
    index: Tensor, lengths: Tensor, size: int, generator: torch.Generator, keep_rest: bool
) -> Iterator[Tensor]:
    """Batches of ``index`` (int64 [N]) in random order, drawn from ``generator`` (of the CPU).

    Batches are made eight at a time, each of texts of about one length (``lengths``, integers, of all texts). The movie
    reviews have 26 tokens on average; a random batch of them is padded to about 40.

    Args:
        keep_rest: also give what does not fill a batch; else it is left out, anew in each epoch.
    """
    order = index[torch.randperm(len(index), generator=generator).to(index.device)]
    # What does not fill a batch is left out before sorting: else it would always be the longest texts.
    whole = len(order) if keep_rest else len(order) - len(order) % size
    for group in torch.split(order[:whole], TOGETHER * size):
        batches = torch.split(group[lengths[group].argsort(stable=True)], size)
        for place in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[place]


def shuffled_batches(index: Tensor, lengths: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Full batches of ``index`` without end, in a new order each time all have been seen; see ``one_epoch``."""
    size = min(size, len(index))
    while True:
        yield from one_epoch(index, lengths, size, generator, keep_rest=False)
