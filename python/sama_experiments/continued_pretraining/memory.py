"""Peak memory of a training step with a meta step against the size of the encoder (paper, Figure 1, bottom right)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import sama_kernels as sk
from sama_kernels.algorithms import Algorithm, ConjugateGradient, Neumann

from ..common.errors import ExperimentError
from ..common.memory import peak_bytes
from .masking import IGNORED
from .model import LanguageHead, input_embeddings

# finetune: downstream loss alone. tartan-mt: both losses. The others: both losses, and a meta step.
ALGORITHMS: dict[str, str | Algorithm | None] = {
    "finetune": None,
    "tartan-mt": None,
    "sama": "sama",
    "neumann": Neumann(),
    "conjugate_gradient": ConjugateGradient(),
}
CPU_SIZES = ("2x128", "4x256", "6x384", "8x512")
CUDA_SIZES = ("6x384", "6x512", "12x768", "24x1024")
VOCABULARY, CLASSES = 50265, 2  # RoBERTa's; any number of classes
HEAD_WIDTH = 64  # of attention, as in RoBERTa
BATCH, TOKENS = 8, 64
MASKED_EVERY = 7  # one token in seven is masked, about 15 %
STEPS = 2  # Adam's state is there from the first one on


@dataclass(frozen=True)
class MemoryPoint:
    """Peak bytes, model and optimizer state included, of steps with one algorithm on one size of encoder."""

    algorithm: str
    size: str
    parameters: int
    bytes: int
    measure: str


class RobertaWithHeads(nn.Module):
    """A RoBERTa of random weights with a classifier and a tied language head."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        # fused attention on the CPU has no second derivative, which Neumann and conjugate gradient need
        eager: dict[str, Any] = {"attn_implementation": "eager"}
        config = transformers.RobertaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // HEAD_WIDTH,
            intermediate_size=4 * width,
            max_position_embeddings=TOKENS + 2,
            **eager,
        )
        self.encoder = transformers.RobertaModel(config, add_pooling_layer=False)
        self.head = nn.Linear(width, CLASSES)
        self.language_head = LanguageHead(width, VOCABULARY, config.layer_norm_eps)

    def downstream_loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """ids int64 [B, T], labels int64 [B]."""
        return F.cross_entropy(self.head(self.encoder(input_ids=ids).last_hidden_state[:, 0]), labels)

    def masked_losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        """ids, targets int64 [B, T], as many masked in each text -> losses [B]."""
        hidden = self.encoder(input_ids=ids).last_hidden_state
        where = targets != IGNORED
        logits = self.language_head(hidden[where], input_embeddings(self.encoder))
        return F.cross_entropy(logits, targets[where], reduction="none").view(len(ids), -1).mean(dim=1)


def measure(
    algorithms: list[str], sizes: list[str], device: torch.device, done: Callable[[MemoryPoint], None]
) -> list[MemoryPoint]:
    """All algorithms on all sizes, "LAYERSxWIDTH"; ``done`` is told each point as it is there."""
    points = []
    parsed = [parse_size(size) for size in sizes]  # before anything long
    for size, (layers, width) in zip(sizes, parsed, strict=True):
        for algorithm in algorithms:
            points.append(_point(algorithm, size, layers, width, device))
            done(points[-1])
    return points


def default_sizes(device: torch.device) -> list[str]:
    """From small up to RoBERTa-large, or as far as a few CPU cores go in a minute or two."""
    return list(CUDA_SIZES if device.type == "cuda" else CPU_SIZES)


def parse_size(text: str) -> tuple[int, int]:
    """ "12x768" -> (12, 768)."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise ExperimentError(f"--memory-sizes {text}: expected LAYERSxWIDTH, such as 12x768")
    layers, width = int(found[1]), int(found[2])
    if width % HEAD_WIDTH != 0:
        raise ExperimentError(f"--memory-sizes {text}: WIDTH must be a multiple of {HEAD_WIDTH}")
    return layers, width


def _point(algorithm: str, size: str, layers: int, width: int, device: torch.device) -> MemoryPoint:
    parameters = 0

    def work() -> None:
        nonlocal parameters
        torch.manual_seed(0)
        model = RobertaWithHeads(layers, width).to(device)
        parameters = sum(p.numel() for p in model.parameters())
        _steps(model, algorithm, device)

    used, how = peak_bytes(work, device)
    return MemoryPoint(algorithm, size, parameters, used, how)


def _steps(model: RobertaWithHeads, algorithm: str, device: torch.device) -> None:
    ids = torch.randint(5, VOCABULARY, (BATCH, TOKENS), device=device)
    labels = torch.randint(CLASSES, (BATCH,), device=device)
    masked = torch.arange(TOKENS, device=device) % MASKED_EVERY == 1
    targets = ids.where(masked, IGNORED)
    weigh = sk.nn.MetaWeightNet().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    @sk.recorded
    def auxiliary_loss() -> Tensor:
        losses = model.masked_losses(ids, targets)
        weighted: Tensor = (weigh(sk.stop_gradient(losses)) * losses).mean()
        return weighted

    def base_loss() -> Tensor:
        return model.downstream_loss(ids, labels) + auxiliary_loss()

    for _ in range(STEPS):
        optimizer.zero_grad()
        # one term after the other: the graph of one is gone before the other's is made
        torch.autograd.backward(model.downstream_loss(ids, labels))
        if algorithm != "finetune":
            torch.autograd.backward(auxiliary_loss())
        optimizer.step()
        how = ALGORITHMS[algorithm]
        if how is not None:
            second_order = how != "sama"
            sk.meta_backward(
                # the Hessian is that of the whole base loss; SAMA's perturbed passes need only what reads the weights
                base_loss if second_order else auxiliary_loss,
                lambda: model.downstream_loss(ids, labels),
                base_params=model,
                meta_params=weigh,
                optimizer=optimizer,
                algorithm=how,
            )
