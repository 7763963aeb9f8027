"""Sharded parameters in mixed precision and in 16 bits, dropout in a real model, and what cannot be done with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from parallel import Divided
from problems import flat, relative_error
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import sama_kernels as sk

LR = 0.05


def bert(dropout: float, policy: MixedPrecisionPolicy | None) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=101, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36,
        max_position_embeddings=12, num_labels=3, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mp_policy=policy or MixedPrecisionPolicy())
    fully_shard(model, mp_policy=policy or MixedPrecisionPolicy())
    return model


class Texts:
    """The closures of a reweighting problem on a rank's own token ids."""

    def __init__(self, model: nn.Module, rank: int) -> None:
        torch.manual_seed(10 + rank)
        self.ids, self.labels = torch.randint(101, (6, 9)), torch.randint(3, (6,))
        self.meta_ids, self.meta_labels = torch.randint(101, (4, 9)), torch.randint(3, (4,))
        torch.manual_seed(2)
        self.model, self.net = model, nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid())

    def base_loss(self) -> Tensor:
        logits = self.model(input_ids=self.ids).logits.float()
        losses = nn.functional.cross_entropy(logits, self.labels, reduction="none")
        return (self.net(self.labels[:, None].float()).squeeze(1) * losses).mean()

    def meta_loss(self) -> Tensor:
        logits = self.model(input_ids=self.meta_ids).logits.float()
        return nn.functional.cross_entropy(logits, self.meta_labels)


def by_hand(texts: Texts, alpha: float) -> tuple[list[Tensor], Tensor]:
    """SAMA for SGD written with DTensors alone: d by `.backward()`, theta moved and brought back by arithmetic."""
    model, params = texts.model, list(texts.model.parameters())
    for p in params:
        p.grad = None
    texts.meta_loss().backward()
    v: list[Any] = [None if p.grad is None else LR * p.grad for p in params]
    for p in params:
        p.grad = None
    norm = torch.stack([x.full_tensor().double().square().sum() for x in v if x is not None]).sum().sqrt()
    epsilon = alpha / norm
    saved = [p.detach().clone() for p in params]
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, x, old in zip(params, v, saved, strict=True):
                p.copy_(old if x is None else old + float(sign * epsilon) * x)
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        sides.append(torch.autograd.grad(texts.base_loss(), list(texts.net.parameters())))
    with torch.no_grad():
        for p, old in zip(params, saved, strict=True):
            p.copy_(old)
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    grads = [-(a - b) / (2 * epsilon.float()) for a, b in zip(*sides, strict=True)]
    for g in grads:
        torch.distributed.all_reduce(g)
        g /= torch.distributed.get_world_size()
    return grads, norm


def _mixed_precision(rank: int, world: int) -> None:
    for policy in (None, MixedPrecisionPolicy(torch.bfloat16, torch.float32), MixedPrecisionPolicy(torch.bfloat16)):
        texts = Texts(bert(0.0, policy), rank)
        optimizer = torch.optim.SGD(texts.model.parameters(), lr=LR)
        texts.base_loss().backward()
        optimizer.step()
        texts.net.zero_grad()
        expected, norm = by_hand(texts, 0.5)
        for sync in ("final", "full"):
            out = sk.meta_grad(
                texts.base_loss, texts.meta_loss, base_params=texts.model, meta_params=texts.net, optimizer=optimizer,
                alpha=0.5, sync=sync,
            )  # fmt: skip
            torch.testing.assert_close(out.norm, norm, rtol=1e-6, atol=0)
            # Both round theta+- to float32; bfloat16 copies of it may then fall to the other side.
            assert relative_error(flat(out.grads), flat(expected)) < (2e-4 if policy is None else 0.02)
            assert float(flat(out.grads).norm()) > 0


@pytest.mark.parametrize("world", [2, 3, 4])
def test_mixed_precision_policies(world: int) -> None:
    run_ranks(world, _mixed_precision)


def _dropout(rank: int, world: int) -> Tensor:
    texts = Texts(bert(0.1, None), rank)
    optimizer = torch.optim.AdamW(texts.model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        texts.base_loss().backward()
        optimizer.step()
    texts.net.zero_grad()
    gathered: list[str] = []
    patched = {name: getattr(DTensor, name) for name in ("full_tensor", "redistribute")}
    for name in patched:
        setattr(DTensor, name, lambda *_, **__: gathered.append("yes"))
    results = []
    for _ in range(2):
        torch.manual_seed(7 + rank)
        out = sk.meta_grad(
            texts.base_loss, texts.meta_loss, base_params=texts.model, meta_params=texts.net, optimizer=optimizer,
            alpha=0.1, sync="full",
        )  # fmt: skip
        results.append(flat(out.grads))
    for name, method in patched.items():
        setattr(DTensor, name, method)
    assert not gathered  # by us; FSDP's own gathering does not go through these
    assert torch.equal(*results) and results[0].norm() > 0
    texts.base_loss().backward()  # and training goes on
    optimizer.step()
    return results[0]


def test_dropout_masks_are_the_same_in_both_passes_and_nothing_is_put_together() -> None:
    first, second = run_ranks(2, _dropout)
    assert torch.equal(first, second)


def _low_bit(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """torchao quantises each rank's part; parts of whole blocks are quantised as in one process."""
    torchao = pytest.importorskip("torchao.optim")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    x, y, lam = torch.randn(8, 64), torch.randn(8, 64), torch.zeros(8, requires_grad=True)
    if world > 1:
        fully_shard(net)
    optimizer = torchao.AdamW8bit(net.parameters(), lr=1e-2)

    def base_loss() -> Tensor:
        return (torch.sigmoid(lam) * (net(x) - y).square().mean(1)).mean()

    for _ in range(3):
        optimizer.zero_grad()
        base_loss().backward()
        optimizer.step()
    assert isinstance(optimizer.state[net[0].weight]["exp_avg"], DTensor) == (world > 1)
    out = sk.meta_grad(
        base_loss, lambda: (net(x) - y).square().mean(), base_params=net, meta_params=[lam], optimizer=optimizer,
        alpha=0.1, sync="full",
    )  # fmt: skip
    return out.grads[0], out.norm


def test_low_bit_moments_of_parts() -> None:
    """Rounding may carry a moment over to the next code: of 1e4 of them, a few."""
    expected, norm = _low_bit(0, 1)
    for got, got_norm in run_ranks(2, _low_bit):
        assert relative_error(got, expected) < 1e-3
        torch.testing.assert_close(got_norm, norm, rtol=1e-3, atol=0)


def _sixteen_bits(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    """Equal parts, and v is equal too: stochastic rounding has to differ between them, but not between copies."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    net = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(net.weight, 0.7)
    fully_shard(net, mesh=mesh)
    scale = torch.ones((), requires_grad=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    x = torch.ones(3, 64, dtype=torch.bfloat16)
    net(x).float().sum().backward()
    optimizer.step()
    moved: list[Tensor] = []

    def base_loss() -> Tensor:
        moved.append(net.weight.to_local().detach().float().clone())
        return scale * net(x).float().mean()

    before = net.weight.to_local().detach().float().clone()
    out = sk.meta_grad(
        base_loss, lambda: net(x).float().mean(), base_params=net, meta_params=[scale], optimizer=optimizer,
        alpha=0.03, rounding="stochastic", seed=5, sync="full",
    )  # fmt: skip
    step = moved[0] - before
    direction = 0.03 / 64  # v is the same everywhere, and has 64^2 elements
    along = (step * direction).double().sum()
    torch.distributed.all_reduce(along)
    torch.testing.assert_close(out.realised, along / 2 / 0.03**2, rtol=1e-5, atol=0)
    return step, out.realised, out.alignment


def test_stochastic_rounding_of_parts() -> None:
    steps, realised, alignment = zip(*run_ranks(4, _sixteen_bits), strict=True)
    assert torch.equal(steps[0], steps[2]) and torch.equal(steps[1], steps[3])  # replicas
    assert not torch.equal(steps[0], steps[1])
    assert len({float(x) for x in realised}) == 1 and len({float(x) for x in alignment}) == 1
    assert 0.8 < float(realised[0]) < 1.2


def _message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (TypeError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


class Mixing(torch.optim.SGD):
    """Stands for an optimizer of the user's, whose update need not be element-wise."""


def _refused(rank: int, world: int) -> dict[str, str]:
    said = {}
    problem = Divided(rank, world)
    fully_shard(problem.net)
    optimizer = problem.optimizer(2)
    problem.train(optimizer)
    for name, options in {
        "exact": {"difference": "exact"},
        "rank one": {"clip_coef": 0.5, "clip_rank_one": True},
        "masters": {"master_params": list(problem.net.parameters())},
    }.items():
        said[name] = _message(lambda options=options: problem.meta_grad(optimizer, **options))
    for name in ("gradient_sync", "all_reduce"):
        getattr(problem.net, f"set_requires_{name}")(False)
        said[name] = _message(lambda: problem.meta_grad(optimizer))
        getattr(problem.net, f"set_requires_{name}")(True)
    mesh_type = type(next(problem.net.parameters()).device_mesh)
    for name in ("base_params", "meta_params"):  # parameters on the CPU of a mesh of GPUs
        other = Divided(rank, world)
        fully_shard(other.net if name == "base_params" else other.weigher)
        with patch.object(mesh_type, "device_type", "cuda"):
            said[f"offloaded {name}"] = _message(lambda other=other: other.meta_grad(None, adaptation="none"))
    sk.register_adaptation(Mixing, lambda grad, param, state, hyper: hyper["lr"] * (grad - grad.mean()))
    mixing = Mixing(problem.net.parameters(), lr=0.1)
    problem.base_loss().backward()
    mixing.step()
    said["mixing"] = _message(lambda: problem.meta_grad(mixing))

    problem = Divided(rank, world)
    zero = ZeroRedundancyOptimizer(problem.net.parameters(), torch.optim.Adam, lr=0.1)
    problem.base_loss().backward()
    zero.step()
    said["zero"] = _message(lambda: problem.meta_grad(zero))
    assert not problem.meta_grad(zero, adaptation="none").degenerate

    problem = Divided(rank, world)
    wrapped = FullyShardedDataParallel(problem.net, device_id=torch.device("cpu"))
    problem.net = wrapped
    said["FSDP1"] = _message(lambda: problem.meta_grad(torch.optim.SGD(wrapped.parameters(), lr=0.1)))

    problem = Divided(rank, world)
    fully_shard(problem.weigher)
    sgd = problem.optimizer(0)
    problem.base_loss().backward()
    sgd.step()
    said["none"] = _message(lambda: problem.meta_grad(sgd, sync="none"))

    problem = Divided(rank, world)
    mesh = [init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))][0]["tensor"]
    parallelize_module(problem.net, mesh, {"0": ColwiseParallel(use_local_output=False), "2": ColwiseParallel()})
    said["tensor parallel"] = _message(lambda: problem.meta_grad(None, adaptation="none", sync="full"))
    return said


def test_what_cannot_be_done_is_said() -> None:
    for said in run_ranks(4, _refused):
        assert said["exact"].startswith('NotImplementedError: difference: "exact" needs forward-mode')
        assert said["rank one"].startswith("NotImplementedError: clip_rank_one: it is not available for sharded")
        assert said["masters"].startswith("NotImplementedError: master_params: not for sharded base_params")
        for name in ("gradient_sync", "all_reduce"):
            assert said[name].startswith("ValueError: base_params, meta_params: set_requires_gradient_sync(False) or")
        for name in ("base_params", "meta_params"):
            text = f"NotImplementedError: {name}: fully_shard with CPUOffloadPolicy"
            assert said[f"offloaded {name}"].startswith(text)
        assert said["mixing"].startswith("TypeError: optimizer: the adaptation of test_fsdp_precision.Mixing may mix")
        assert "ZeroRedundancyOptimizer" in said["zero"] and "fully_shard" in said["zero"]
        assert said["FSDP1"].startswith(
            "NotImplementedError: base_params, meta_params: FullyShardedDataParallel (FSDP1)"
        )
        assert said["none"].startswith('ValueError: sync: "none" would perturb base_params along another v')
        assert said["tensor parallel"].startswith("ValueError: base_params: tensor 0 is a DTensor of which rank")
