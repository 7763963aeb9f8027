"""What torch does behind a closure's back: in-place renormalisation, another path of attention without gradients,
autocast's copies of the weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sama_kernels as sk


def trained(model: nn.Module, loss: Callable[[], Tensor], lr: float = 0.1) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(2):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("functional", [False, True])
def test_an_embedding_that_renormalises_itself_is_an_error(functional: bool) -> None:
    """It would overwrite theta+, of whose bits the way back to theta is made; of a function that is seen in pass 1."""
    torch.manual_seed(0)
    embedding = nn.Embedding(9, 4, max_norm=None if functional else 1.0)
    weights, rows = nn.Parameter(torch.zeros(6)), torch.randint(9, (6,))

    def loss() -> Tensor:
        x = F.embedding(rows, embedding.weight, max_norm=1.0) if functional else embedding(rows)
        return (weights.sigmoid()[:, None] * (x - 1).square()).mean()

    optimizer = trained(embedding, loss)
    loss()  # a fixed point now
    before = embedding.weight.detach().clone()
    error, words = (
        (RuntimeError, "meta_loss: it writes") if functional else (ValueError, "base_params: an nn.Embedding")
    )
    with pytest.raises(error, match=words):
        sk.meta_grad(loss, loss, base_params=embedding, meta_params=[weights], optimizer=optimizer, alpha=0.1)
    torch.testing.assert_close(embedding.weight, before, rtol=1e-6, atol=1e-6)
    assert embedding.weight.requires_grad


@pytest.mark.parametrize("held", [False, True])
def test_attention_with_padding_takes_the_path_with_gradients(held: bool) -> None:
    """nn.TransformerEncoder in eval mode, where torch's fast path zeroes padded positions: exact derivative."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).double().eval()
    x, y, weights = torch.randn(8, 3, 4).double(), torch.randn(8).double(), nn.Parameter(torch.randn(8).double())
    padded = torch.zeros(8, 3, dtype=torch.bool)
    padded[1:3, 2] = True

    def errors(y: Tensor) -> Tensor:
        return (encoder(x, src_key_padding_mask=padded).sum((1, 2)) - y).square()

    def base_loss() -> Tensor:
        each = errors(y)
        return ((weights + sk.stop_gradient(each) if held else weights).sigmoid() * each).mean()

    def meta_loss() -> Tensor:
        return errors(-y).mean()

    optimizer = trained(encoder, base_loss, lr=1e-3)
    was = torch.backends.mha.get_fastpath_enabled()
    out = sk.meta_grad(
        base_loss, meta_loss, base_params=encoder, meta_params=[weights], optimizer=optimizer, alpha=1e-4
    )  # fmt: skip
    assert was and torch.backends.mha.get_fastpath_enabled()
    theta = list(encoder.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        d = torch.autograd.grad(meta_loss(), theta)
        each = errors(y)
        inputs = weights + each.detach() if held else weights
        g = torch.autograd.grad((inputs.sigmoid() * each).mean(), theta, create_graph=True)
        exact = -1e-3 * torch.autograd.grad(sum((a * b).sum() for a, b in zip(g, d, strict=True)), weights)[0]  # type: ignore[arg-type]
    assert out.base_loss_plus == pytest.approx(float(base_loss()), rel=1e-3)
    torch.testing.assert_close(out.grads[0], exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("update_base", [False, True])
def test_within_the_autocast_block_of_the_base_step(update_base: bool) -> None:
    """autocast keeps 16-bit copies of the weights to the end of its block: those of before `optimizer.step()`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    x, y, weights = torch.randn(8, 4), torch.randn(8), nn.Parameter(torch.zeros(8))

    def base_loss() -> Tensor:
        return (weights.sigmoid() * (model(x).squeeze(1).float() - y).square()).mean()

    def meta_loss() -> Tensor:
        return (model(x).squeeze(1).float() + y).square().mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base_loss().backward()
        optimizer.step()
        out = sk.meta_grad(
            base_loss, meta_loss, base_params=model, meta_params=[weights], optimizer=optimizer, alpha=0.5,
            update_base=update_base,
        )  # fmt: skip
        after = meta_loss()  # with a graph: it takes autocast's copies
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert after == meta_loss()
        assert update_base or out.meta_loss == after
