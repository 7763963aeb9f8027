"""DynaMS: how much it keeps and when, what it selects by, and the proxy that shares the model's parameters."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_data_pruning_scores import tiny
from torch import Tensor, nn

from sama_experiments.common.errors import ExperimentError
from sama_experiments.data_pruning import scores
from sama_experiments.data_pruning.dynams import DynamsTraining, falling_shares
from sama_experiments.data_pruning.methods import Settings
from sama_experiments.data_pruning.models import Classifier, new_model
from sama_experiments.data_pruning.proxy import Proxy
from sama_experiments.data_pruning.training import Trainer


@pytest.mark.parametrize(("epochs", "warmup", "every", "mean"), [(10, 1, 1, 0.5), (120, 10, 10, 0.7), (9, 2, 3, 0.9)])
def test_shares_fall_by_one_factor_to_the_mean_asked_for(epochs: int, warmup: int, every: int, mean: float) -> None:
    shares = falling_shares(epochs, warmup, every, mean)
    assert len(shares) == epochs and sum(shares) / epochs == pytest.approx(mean, abs=1e-12)
    assert shares[:warmup] == [1.0] * warmup and 0 < shares[warmup] < 1
    starts = shares[warmup::every]
    for place, share in enumerate(starts):
        assert share == pytest.approx(starts[0] ** (place + 1))
        assert set(shares[warmup + place * every : warmup + (place + 1) * every]) == {share}


def test_too_long_a_warmup_is_refused() -> None:
    with pytest.raises(ExperimentError, match=r"--dynams-warmup 5: with 0\.5 pruned that uses up what 10 epochs"):
        falling_shares(10, 5, 1, 0.5)


def test_it_sees_as_many_samples_as_a_static_method() -> None:
    settings = Settings(batch_size=10, epochs=10, dynams_warmup=2, dynams_every=3)
    trainer = DynamsTraining(tiny(), settings, 0, 0.4)
    sizes, selections = [], []
    for _ in range(10):
        before = trainer.rows
        trainer.run_epoch()
        sizes.append(len(trainer.rows))
        selections.append(not torch.equal(before, trainer.rows))
    assert abs(sum(sizes) - 0.6 * 40 * 10) <= 4  # three roundings, of three epochs or two
    assert [place for place, selected in enumerate(selections) if selected] == [2, 5, 8]
    assert sizes[2] > sizes[5] > sizes[8]
    assert 0 < trainer.selection_seconds < trainer.seconds


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_it_keeps_the_samples_nearest_to_the_boundary(width: float) -> None:
    settings = Settings(batch_size=10, epochs=4, dynams_warmup=1, dynams_every=1, dynams_proxy=width)
    trainer = DynamsTraining(tiny(), settings, 0, 0.5)
    trainer.run_epoch()
    model = trainer.model if trainer.proxy is None else trainer.proxy.model()
    assert (width == 1) == (model is trainer.model)
    logits = model(trainer.data.train.batch(torch.arange(40), None)).detach()
    distance = -scores.boundary_margin(logits, trainer.data.train.labels, model.head.weight.detach())
    trainer.run_epoch()
    dropped = torch.ones(40, dtype=torch.bool)
    dropped[trainer.rows] = False
    assert len(trainer.rows) == round(40 * trainer.shares[1]) < 40
    assert distance[trainer.rows].max() <= distance[dropped].min()


def halved(wide: Classifier, narrow: Classifier) -> Classifier:
    """``narrow`` with the first channels of ``wide``, layer by layer: another way to the same parameters."""
    for own, layer in zip(narrow.modules(), wide.modules(), strict=True):
        if isinstance(own, nn.Conv2d | nn.Linear):
            own.weight.data = layer.weight.detach()[: own.weight.shape[0], : own.weight.shape[1]].clone()
        elif isinstance(own, nn.BatchNorm2d):
            own.weight.data = layer.weight.detach()[: own.num_features].clone()
        if getattr(own, "bias", None) is not None:
            own.bias.data = layer.bias.detach()[: len(own.bias)].clone()
    return narrow


@pytest.mark.parametrize("name", ["cnn", "resnet18", "resnet50"])
def test_the_proxy_is_the_first_channels_of_every_layer(name: str) -> None:
    torch.manual_seed(0)
    wide = new_model(name, 2, 16, 5)
    for p in wide.parameters():  # also those that start at 0 or 1
        p.data += 0.1 * torch.randn_like(p)
    proxy = Proxy(wide, new_model(name, 2, 16, 5, width=0.5))
    expected = halved(wide, new_model(name, 2, 16, 5, width=0.5))
    images, labels = torch.randn(6, 2, 16, 16), torch.randint(5, (6,))

    logits = proxy(images)
    torch.testing.assert_close(logits, expected(images))
    F.cross_entropy(logits, labels).backward()
    F.cross_entropy(expected(images), labels).backward()
    for (key, p), (_, own) in zip(wide.named_parameters(), expected.named_parameters(), strict=True):
        assert p.grad is not None and own.grad is not None
        corner = tuple(map(slice, own.shape))
        torch.testing.assert_close(p.grad[corner], own.grad, msg=lambda text, key=key: f"{key}: {text}")
        assert p.grad.count_nonzero() == p.grad[corner].count_nonzero()
    assert proxy.model() is proxy.narrow and all(p.grad is None for p in proxy.narrow.parameters())
    proxy(images)  # both have seen the batch twice: the statistics of batch normalisation are the same
    torch.testing.assert_close(proxy.model().eval()(images), expected.eval()(images), rtol=1e-4, atol=1e-5)


def test_the_losses_of_model_and_proxy_are_added() -> None:
    """An epoch against steps of plain SGD on the sum, and the proxy is left alone when nothing will be selected."""
    settings = Settings(batch_size=40, epochs=3, dynams_warmup=2, dynams_every=1, momentum=0.0)
    trainer = DynamsTraining(tiny(), settings, 0, 0.2)
    assert trainer.proxy is not None
    model = copy.deepcopy(trainer.model)
    images, labels = trainer.data.train.batch(torch.arange(40), None), trainer.data.train.labels
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    calls: list[int] = []
    trainer.proxy = _counted(trainer.proxy, calls)
    trainer.run_epoch()
    optimizer.zero_grad()
    twin = Proxy(model, new_model("cnn", 1, 8, 3, width=0.5))
    (F.cross_entropy(model(images), labels) + F.cross_entropy(twin(images), labels)).backward()
    optimizer.step()
    for found, expected in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    trainer.run_epoch()
    assert len(calls) == 2
    trainer.run_epoch()  # the last selection has been made
    assert len(calls) == 2


def _counted(proxy: Proxy, calls: list[int]) -> Proxy:
    class Counted(Proxy):
        def __init__(self) -> None:
            self.__dict__.update(vars(proxy))

        def __call__(self, images: Tensor) -> Tensor:
            calls.append(len(images))
            return super().__call__(images)

    return Counted()


def test_the_model_starts_as_that_of_any_other_method() -> None:
    settings = Settings(batch_size=10, epochs=4)
    own, plain = DynamsTraining(tiny(), settings, 7, 0.5), Trainer(tiny(), settings, 7, 4)
    for a, b in zip(own.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)
