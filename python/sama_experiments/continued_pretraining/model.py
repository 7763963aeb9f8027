"""One encoder with two heads: the downstream classifier, and the masked language model tied to the embeddings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from ..common.encoder import PretrainedEncoder, TextClassifier
from ..common.errors import ExperimentError
from .masking import IGNORED

# (dense layer, normalisation, bias of the decoder) of RoBERTa, BERT, DistilBERT
PRETRAINED_HEADS = (
    ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
)


class LanguageHead(nn.Module):
    """Dense layer, GELU, normalisation, and the word embeddings as decoder, as in BERT and RoBERTa."""

    def __init__(self, width: int, vocabulary: int, epsilon: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """hidden [M, H], word embeddings [V, H] -> logits [M, V]."""
        return F.linear(self.norm(F.gelu(self.dense(hidden))), embeddings, self.bias)


class MultitaskModel(TextClassifier):
    """Encoder layers to train, a classifier and a language head; base parameters of every method.

    Where the embeddings are below the trained layers, the decoder reads the frozen ones.
    """

    def __init__(self, encoder: PretrainedEncoder, classes: int, pooling: str, head: LanguageHead) -> None:
        super().__init__(copy.deepcopy(encoder.trained), encoder.width, classes, pooling, encoder.dropout)
        self.language_head = copy.deepcopy(head)
        # a plain tensor is in no state_dict and is not copied
        self._frozen = None if encoder.train_layers is None else word_embeddings(encoder)
        self.to(encoder.device)

    def masked_losses(self, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        """Mean cross entropy over the masked tokens of each text; targets int64 [B, T] -> float32 [B]."""
        hidden = self.encoder(**inputs).last_hidden_state
        where = targets != IGNORED
        embeddings = input_embeddings(self.encoder) if self._frozen is None else self._frozen
        losses = F.cross_entropy(self.language_head(hidden[where], embeddings), targets[where], reduction="none")
        count = where.sum(dim=1)
        text = torch.arange(len(targets), device=targets.device).repeat_interleave(count)
        return losses.new_zeros(len(targets)).index_add(0, text, losses) / count.clamp(min=1)


def input_embeddings(model: Any) -> Tensor:
    """The word embeddings of a Hugging Face model, float32 [V, H]."""
    weight: Tensor = model.get_input_embeddings().weight
    return weight


def word_embeddings(encoder: PretrainedEncoder) -> Tensor:
    """The pretrained ones, float32 [V, H]; not copied."""
    weight = input_embeddings(encoder.model).detach()
    if weight.shape[1] != encoder.width:
        raise ExperimentError(
            f"--model: embeddings of width {weight.shape[1]} cannot decode hidden states of {encoder.width}"
        )
    return weight


def new_language_head(encoder: PretrainedEncoder) -> LanguageHead:
    """A head that has learned nothing (drawn from torch's global generator)."""
    vocabulary = len(word_embeddings(encoder))
    return LanguageHead(encoder.width, vocabulary, getattr(encoder.model.config, "layer_norm_eps", 1e-12))


def pretrained_language_head(encoder: PretrainedEncoder, folder: Path) -> LanguageHead | None:
    """The head that the model was pretrained with; None where the folder holds none, as with sentence encoders."""
    try:
        model, report = transformers.AutoModelForMaskedLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ExperimentError(f"--model {folder}: no masked language model: {str(error).splitlines()[0]}") from error
    weights = model.state_dict()
    for dense, norm, bias in PRETRAINED_HEADS:
        if f"{dense}.weight" in weights and f"{dense}.weight" not in report["missing_keys"]:
            head = new_language_head(encoder)
            for mine, theirs in (("dense", dense), ("norm", norm)):
                for kind in ("weight", "bias"):
                    head.get_parameter(f"{mine}.{kind}").data.copy_(weights[f"{theirs}.{kind}"])
            head.bias.data.copy_(weights[bias])
            return head.to(encoder.device)
    return None
