"""Losses that write parameters while they run: an error, with theta as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sama_kernels as sk
from sama_kernels.guards import no_fast_attention


class MaxNorm(nn.Linear):
    """As EEGNet has it: each row of the weight is renormalised in forward, through `.data`."""

    max_norm = 0.5

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=self.max_norm)
        return super().forward(x)


class Refreshed(nn.Linear):
    """Gives its weight other memory with the same contents, as `nn.LSTM.flatten_parameters()` does on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data.clone()
        return super().forward(x)


class Momentum(nn.Module):
    """As MoCo has it: the second encoder follows the first in forward."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.query = nn.Linear(4, 3)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for k, q in zip(self.key.parameters(), self.query.parameters(), strict=True):
                if self.in_place:
                    k.mul_(0.9).add_(q, alpha=0.1)
                else:
                    k.data = k.data * 0.9 + q.data * 0.1
        return F.cosine_similarity(self.query(x), self.key(x))


def closures(model: nn.Module) -> tuple[Callable[[], Tensor], Callable[[], Tensor], nn.Parameter]:
    x, weights = torch.randn(8, 4), nn.Parameter(torch.randn(8))
    return (
        lambda: (weights.sigmoid() * model(x).square().reshape(8, -1).sum(1)).mean(),
        lambda: model(-x).mean(),
        weights,
    )


def stepped(params: list[nn.Parameter], loss: Callable[[], Tensor]) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(params, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("difference", ["central", "forward", "exact"])
@pytest.mark.parametrize("where", ["meta_loss", "base_loss"])
def test_a_weight_replaced_in_forward_is_an_error_and_comes_back(where: str, difference: str) -> None:
    model = MaxNorm(4, 3)
    base_loss, meta_loss, weights = closures(model)
    optimizer = stepped(list(model.parameters()), base_loss)
    with torch.no_grad():
        model.weight.mul_(3)
    theta, memory = model.weight.detach().clone(), model.weight.data_ptr()
    weight = model.weight
    other = {"meta_loss": meta_loss, "base_loss": lambda: F.linear(torch.ones(1, 4), weight).mean()}[where]
    with pytest.raises(
        RuntimeError, match=rf"{where}: it writes base parameters \(1; the first is tensor 0, shape \(3, 4"
    ):
        sk.meta_grad(
            base_loss, other, base_params=[model.weight], meta_params=[weights], optimizer=optimizer, alpha=0.1,
            difference=difference,
        )  # fmt: skip
    assert torch.equal(model.weight, theta) and model.weight.data_ptr() == memory


def test_a_weight_replaced_by_a_pass_that_fails_comes_back() -> None:
    model = MaxNorm(4, 3)
    base_loss, _, weights = closures(model)
    optimizer = stepped(list(model.parameters()), base_loss)
    with torch.no_grad():
        model.weight.mul_(3)
    theta, weight = model.weight.detach().clone(), model.weight

    def failing() -> Tensor:
        base_loss()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sk.meta_grad(
            failing, lambda: F.linear(torch.ones(1, 4), weight).mean(), base_params=[weight], meta_params=[weights],
            optimizer=optimizer, alpha=0.1,
        )  # fmt: skip
    assert torch.equal(weight, theta) and weight.requires_grad


def test_a_weight_in_other_memory_with_the_same_contents_is_no_change() -> None:
    refreshed, plain = Refreshed(4, 3), nn.Linear(4, 3)
    plain.load_state_dict(refreshed.state_dict())
    results = []
    state = torch.get_rng_state()
    for model in (refreshed, plain):
        torch.set_rng_state(state)
        base_loss, meta_loss, weights = closures(model)
        optimizer = stepped(list(model.parameters()), base_loss)
        theta = model.weight.detach().clone()
        out = sk.meta_grad(
            base_loss, meta_loss, base_params=model, meta_params=[weights], optimizer=optimizer, alpha=0.1
        )
        assert torch.equal(model.weight, theta)
        results.append(out.grads[0])
    assert torch.equal(*results) and results[0].any()


def test_a_weight_that_two_passes_give_other_memory_comes_back_from_the_second() -> None:
    """The first one leaves it in another place, with the same contents; the second one has to give that back."""
    model, calls = nn.Linear(4, 3), 0
    base_loss, meta_loss, weights = closures(model)
    optimizer = stepped(list(model.parameters()), base_loss)
    theta = model.weight.detach().clone()

    def moving() -> Tensor:
        nonlocal calls
        calls += 1
        model.weight.data = model.weight.data.clone() if calls == 1 else model.weight.data * 0.5
        return base_loss()

    with pytest.raises(RuntimeError, match=r"base_loss: it writes base parameters \(1; the first is tensor 0"):
        sk.meta_grad(moving, meta_loss, base_params=model, meta_params=[weights], optimizer=optimizer, alpha=0.1)
    assert calls == 2 and torch.equal(model.weight, theta)


@pytest.mark.parametrize("in_place", [True, False])
def test_another_parameter_written_in_the_base_loss_is_an_error(in_place: bool) -> None:
    model = Momentum(in_place)
    base_loss, meta_loss, weights = closures(model)
    theta = list(model.query.parameters())
    optimizer = stepped(theta, base_loss)
    before = [p.detach().clone() for p in theta]
    with pytest.raises(RuntimeError, match=r"base_loss: it writes parameters that are neither .* \(2; the first has"):
        sk.meta_grad(base_loss, meta_loss, base_params=theta, meta_params=[weights], optimizer=optimizer, alpha=0.1)
    assert all(map(torch.equal, theta, before))


def test_passes_that_overlap_leave_the_switch_of_attention_as_it_was() -> None:
    """In two threads: one begins while the other runs and ends after it; 'off' is not what was before."""
    enabled = torch.backends.mha.get_fastpath_enabled
    assert enabled()
    first, second = no_fast_attention(), no_fast_attention()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not enabled()
    second.__exit__(None, None, None)
    assert enabled()
