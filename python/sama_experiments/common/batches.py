"""Endless streams of batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def shuffled_batches(index: Tensor, lengths: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Full batches of ``index`` (int64 [N]) without end, in a new order each time all have been seen.

    Batches are made eight at a time, each of texts of about one length (``lengths``, int64, of all texts), so that
    little of a batch is padding (the movie reviews have 26 tokens on average, a random batch is padded to about 40).
    """
    size = min(size, len(index))
    while True:
        order = index[torch.randperm(len(index), generator=generator).to(index.device)]
        # What does not fill a batch is left out before sorting: else it would always be the longest texts.
        for group in torch.split(order[: len(order) - len(order) % size], 8 * size):
            batches = torch.split(group[lengths[group].argsort(stable=True)], size)
            for place in torch.randperm(len(batches), generator=generator).tolist():
                yield batches[place]
