"""Fits a language head to an encoder that has none, before any method starts: what RoBERTa brings along."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..common.batches import shuffled_batches
from ..common.encoder import PretrainedEncoder
from .masking import MaskedCorpus
from .model import LanguageHead, MultitaskModel, new_language_head

BATCH = 32
LEARNING_RATE = 1e-3


def fit_language_head(
    encoder: PretrainedEncoder, corpus: MaskedCorpus, steps: int, seed: int, on_step: Callable[[], None]
) -> LanguageHead:
    """Train the head alone on the texts of all domains alike; the encoder stays as it is, without dropout.

    Else a head that knows nothing would drag the encoder along in the first steps of every method.
    """
    torch.manual_seed(seed)
    model = MultitaskModel(encoder, 2, "mean", new_language_head(encoder)).eval()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(len(corpus.lengths), device=corpus.lengths.device)
    batches = shuffled_batches(rows, corpus.lengths, BATCH, generator)
    for parameter in model.encoder.parameters():
        parameter.requires_grad_(False)
    head = model.language_head
    optimizer = torch.optim.Adam(head.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for _ in range(steps):
        batch = corpus.batch(next(batches), generator)
        optimizer.zero_grad()
        torch.autograd.backward(model.masked_losses(batch.inputs, batch.targets).mean())
        optimizer.step()
        schedule.step()
        on_step()
    return head
