"""Batches of a small clean set, for ever."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EndlessBatches(Sampler[list[int]]):
    """The indices of batch `start`, `start` + 1 and so on, for ever; every pass over the samples in a new order.

    Batch k depends on the arguments alone, so that a run that goes on at batch k sees what it would have seen. The
    processes divide every batch among themselves; a set that is smaller than a batch comes several times in it.

    Arguments:
        samples: how many there are. size: of a batch, per process. rank, ranks: this process, and how many.
    """

    def __init__(
        self, samples: int, size: int, *, seed: int = 0, rank: int = 0, ranks: int = 1, start: int = 0
    ) -> None:
        self.start = start
        self._samples, self._size, self._seed = samples, size, seed
        self._rank, self._ranks = rank, ranks
        self._order: tuple[int, list[int]] = -1, []

    def __iter__(self) -> Iterator[list[int]]:
        k = self.start
        while True:
            places = range(k * self._size * self._ranks, (k + 1) * self._size * self._ranks)
            yield [self._at(place) for place in places[self._rank :: self._ranks]]
            k += 1

    def _at(self, place: int) -> int:
        """The sample at this place of the endless sequence."""
        turn, row = divmod(place, self._samples)
        if self._order[0] != turn:
            generator = torch.Generator().manual_seed((self._seed + turn) % 2**63)
            self._order = turn, torch.randperm(self._samples, generator=generator).tolist()
        return self._order[1][row]
