"""Activation checkpointing, frozen and tied parameters of transformers' own models: against exact double backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import Bilevel, flat, meta_grad, mixed_derivative, relative_error, same_bits, snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sama_kernels as sk

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def bert(dropout: float = 0.0) -> nn.Module:
    config = transformers.BertConfig(
        **SIZES, num_hidden_layers=2, max_position_embeddings=16, num_labels=3, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, attn_implementation="eager",
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).double().train()  # type: ignore[no-any-return]


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=16, n_head=2, n_layer=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double().train()  # type: ignore[no-any-return]


def masked_bert() -> nn.Module:
    config = transformers.BertConfig(
        **SIZES, num_hidden_layers=1, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    return transformers.BertForMaskedLM(config).double().train()  # type: ignore[no-any-return]


def reweighting(net: nn.Module, losses: Callable[[Tensor], Tensor] | None = None) -> Bilevel:
    """Learned weights per sample, from the losses of a classifier or of a language model."""
    weigher = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1), nn.Sigmoid()).double()
    ids, labels = torch.randint(1, 60, (2, 6, 8)), torch.randint(0, 3, (6,))

    def per_sample(k: int) -> Tensor:
        logits = net(ids[k]).logits
        if logits.dim() == 2:
            return F.cross_entropy(logits, labels, reduction="none")
        return F.cross_entropy(logits.transpose(1, 2), ids[k], reduction="none").mean(1)

    @sk.recorded
    def base_loss() -> Tensor:
        each = per_sample(0)
        return (weigher(sk.stop_gradient(each)[:, None]).squeeze(1) * each).mean()

    return Bilevel(net, weigher, base_loss, lambda: per_sample(1).mean())


def exact(problem: Bilevel) -> Tensor:
    """-d2L_base/dlambda dtheta d by double backward, over the parameters that are trained."""
    theta = tuple(p for p in problem.net.parameters() if p.requires_grad)
    d = torch.autograd.grad(problem.meta_loss(), theta, allow_unused=True)
    g = torch.autograd.grad(problem.base_loss(), theta, create_graph=True, allow_unused=True)
    along_d = sum((a * b).sum() for a, b in zip(g, d, strict=True) if a is not None and b is not None)
    return flat(torch.autograd.grad(-along_d, problem.lam))


def sama_na(problem: Bilevel) -> Tensor:
    problem.base_loss()  # held values of today's theta
    return flat(meta_grad(problem, None, adaptation="none", alpha=1e-4).grads)


@pytest.mark.parametrize("make", [gpt2, masked_bert], ids=["GPT-2", "BERT"])
def test_tied_language_model_heads(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    problem = reweighting(make())
    net: Any = problem.net
    assert net.get_output_embeddings().weight is net.get_input_embeddings().weight
    assert relative_error(sama_na(problem), exact(problem)) < 1e-5


def test_frozen_layers_take_no_part() -> None:
    torch.manual_seed(0)
    problem = reweighting(bert())
    net: Any = problem.net
    for part in (net.bert.embeddings, net.bert.encoder.layer[0]):
        part.requires_grad_(False)
    before = snapshot(problem.theta)
    optimizer = torch.optim.AdamW([p for p in problem.theta if p.requires_grad], lr=0.01)
    for _ in range(2):
        problem.step(optimizer)
    assert meta_grad(problem, optimizer).norm > 0
    flags = [p.requires_grad for p in problem.theta]
    assert relative_error(sama_na(problem), exact(problem)) < 1e-6
    assert [p.requires_grad for p in problem.theta] == flags
    assert all(same_bits(p, q) for p, q in zip(problem.theta, before, strict=True) if not p.requires_grad)


def test_gradient_checkpointing_of_transformers_changes_nothing() -> None:
    """With dropout: what is recomputed in a backward pass sees the masks of its forward pass."""
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        problem = reweighting(bert(dropout=0.2))
        if checkpointed:
            enable(problem.net, use_reentrant=False)
        optimizer = torch.optim.Adam(problem.theta, lr=0.01)
        for _ in range(3):
            problem.step(optimizer)
        grads.append(flat(meta_grad(problem, optimizer, alpha=0.01).grads))
    assert grads[0].norm() > 0
    assert relative_error(grads[1], grads[0]) < 1e-9


def enable(net: Any, use_reentrant: bool) -> None:
    """Gradient checkpointing as transformers switches it on (by the name it has had for years)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        assert net.is_gradient_checkpointing


@pytest.mark.parametrize("frozen_embeddings", [False, True])
def test_reentrant_checkpointing_is_an_error(frozen_embeddings: bool) -> None:
    """Torch's own where its engine meets the checkpoint; ours where it would miss parameters without a word."""
    torch.manual_seed(0)
    problem = reweighting(bert())
    net: Any = problem.net
    enable(net, use_reentrant=True)
    if frozen_embeddings:  # as with adapters: then the inputs of the layers must be made to require grad
        net.bert.embeddings.requires_grad_(False)
        net.bert.embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    before = snapshot(problem.theta)
    with pytest.raises((ValueError, RuntimeError), match="use_reentrant=False"):
        meta_grad(problem, None, adaptation="none")
    assert all(map(same_bits, problem.theta, before))


class Layers(nn.Module):
    """Three layers with dropout, each recomputed in the backward pass."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(dropout)).double() for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lambda_before_checkpointed_layers(dropout: float) -> None:
    """lambda's gradient passes through layers that are frozen and recomputed."""
    torch.manual_seed(0)
    net, prompt = Layers(dropout), nn.Parameter(torch.randn(6, dtype=torch.float64))
    x = torch.randn(2, 12, 6, dtype=torch.float64)
    problem = Bilevel(
        net,
        nn.ParameterList([prompt]),
        lambda: net(x[0] + prompt).square().mean(),
        lambda: (net.eval()(x[1]) - 1).square().mean() + 0 * net.train()(x[1]).sum(),
    )
    state = torch.get_rng_state()
    got = flat(meta_grad(problem, None, adaptation="none", alpha=1e-4).grads)
    d = torch.autograd.grad(problem.meta_loss(), problem.theta)
    torch.set_rng_state(state)  # the perturbed passes start from where the meta step found the generator
    assert relative_error(got, mixed_derivative(problem, d)) < 1e-6


def test_lambda_inside_a_reentrant_checkpoint_is_an_error() -> None:
    """The checkpoint is in the perturbed passes alone, where theta is frozen; another lambda is outside it."""
    net = nn.Linear(3, 3).double()
    scale, shift = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = torch.randn(4, 3, dtype=torch.float64)

    def base_loss() -> Tensor:
        return checkpoint(lambda y: (net(y) * scale).square(), x + shift, use_reentrant=True).mean()  # type: ignore[no-any-return]

    with pytest.raises((ValueError, RuntimeError), match="use_reentrant=False"):
        sk.meta_grad(
            base_loss, lambda: net(x).square().mean(), base_params=net, meta_params=[scale], optimizer=None,
            adaptation="none",
        )  # fmt: skip
