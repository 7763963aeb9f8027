"""Texts with some tokens masked out, for the masked-language-model loss (Devlin et al. 2019, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.encoder import EncodedTexts, PretrainedEncoder
from ..common.errors import ExperimentError

IGNORED = -100  # target of a token that need not be guessed
MASKED, RANDOM = 0.8, 0.1  # of the chosen tokens so many become the mask token, a random one; the others stay


def mask_tokens(
    ids: Tensor, maskable: Tensor, share: float, mask_id: int, vocabulary: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """ids, int64 [N, T], and which of them may be chosen, bool [N, T] -> (masked ids, targets), both int64 [N, T].

    Of each text the nearest number to ``share`` of its tokens is chosen, at least one where there is one. Targets are
    the tokens before masking, IGNORED where none was chosen.
    """
    draw = torch.rand(ids.shape, generator=generator).to(ids.device).masked_fill(~maskable, 2.0)
    count = maskable.sum(dim=1, keepdim=True)
    wanted = (count * share).round().clamp(min=1).minimum(count)
    chosen = draw.argsort(dim=1).argsort(dim=1) < wanted
    kind = torch.rand(ids.shape, generator=generator).to(ids.device)
    other = torch.randint(vocabulary, ids.shape, generator=generator).to(ids.device)
    masked = ids.where(~(chosen & (kind < MASKED)), mask_id)
    masked = masked.where(~(chosen & (kind >= MASKED) & (kind < MASKED + RANDOM)), other)
    return masked, ids.where(chosen, IGNORED)


@dataclass(frozen=True)
class MaskedBatch:
    """The model's keyword arguments for B texts, what is to be guessed (int64 [B, T]), and the texts' rows [B]."""

    inputs: dict[str, Tensor]
    targets: Tensor
    rows: Tensor


class MaskedCorpus:
    """The auxiliary texts, encoded and masked.

    Where the lower layers are frozen, they have to see the masked text: each text then stands here ``draws`` times with
    different masks that never change, which BERT's own pretraining did as well. Where all layers are trained, each
    batch draws its masks anew, as RoBERTa's did.

    Attributes:
        rows: R = N * draws encoded texts; features are those of the text as it stands here.
        lengths: int64 [R]. domain: int64 [R], the number of each row's domain. domains: their names.
    """

    def __init__(
        self,
        encoder: PretrainedEncoder,
        auxiliary: dict[str, list[str]],
        share: float,
        draws: int,
        seed: int,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        if encoder.tokenizer.mask_token_id is None:
            raise ExperimentError("--model: its tokenizer has no mask token, it is no masked language model")
        self.domains = list(auxiliary)
        self.share = share
        self._mask_id: int = encoder.tokenizer.mask_token_id
        self._vocabulary: int = encoder.model.config.vocab_size
        texts = [text for found in auxiliary.values() for text in found]
        domain = torch.cat([torch.full((len(found),), number) for number, found in enumerate(auxiliary.values())])
        tokens = encoder.tokenize(texts)
        special = torch.tensor(encoder.tokenizer.all_special_ids, device=encoder.device)
        self._maskable = tokens["attention_mask"].bool() & ~torch.isin(tokens["input_ids"], special)
        self._targets: Tensor | None = None
        if encoder.train_layers is not None:
            generator = torch.Generator().manual_seed(seed)
            tokens = {name: value.repeat(draws, 1) for name, value in tokens.items()}
            domain, self._maskable = domain.repeat(draws), self._maskable.repeat(draws, 1)
            tokens["input_ids"], self._targets = self._mask(tokens["input_ids"], self._maskable, generator)
        self.rows: EncodedTexts = encoder.encode_tokens(tokens, progress)
        self.domain = domain.to(encoder.device)

    @property
    def lengths(self) -> Tensor:
        """int64 [R], tokens that are not padding."""
        return self.rows.lengths

    def features(self) -> Tensor:
        """float32 [R, H], sentence features of the frozen encoder, of mean 0 and size 1/3 over the rows.

        They are many and each says little: at this size they do not drown the loss in the weight net's input.
        """
        found = self.rows.features
        return (found - found.mean(dim=0)) / (found.std(dim=0) + 1e-6) / 3

    def batch(self, rows: Tensor, generator: torch.Generator) -> MaskedBatch:
        """The texts ``rows`` (int64 [B]); the generator is drawn from where masks are drawn anew."""
        inputs = self.rows.batch(rows)
        longest = inputs["attention_mask"].shape[1]
        if self._targets is not None:
            return MaskedBatch(inputs, self._targets[rows, :longest], rows)
        inputs["input_ids"], targets = self._mask(inputs["input_ids"], self._maskable[rows, :longest], generator)
        return MaskedBatch(inputs, targets, rows)

    def _mask(self, ids: Tensor, maskable: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return mask_tokens(ids, maskable, self.share, self._mask_id, self._vocabulary, generator)
