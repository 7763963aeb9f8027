"""Scores, models and the search with SAMA against formulas that are written another way."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sama_experiments.data_pruning import scores
from sama_experiments.data_pruning.experiment import findings
from sama_experiments.data_pruning.images import Dataset, InMemoryImages, Truth, seeded
from sama_experiments.data_pruning.methods import Settings
from sama_experiments.data_pruning.models import MODELS, new_model
from sama_experiments.data_pruning.sama import SamaSearch, _WeightedStep
from sama_experiments.data_pruning.training import FullTraining, Trainer


def outputs() -> tuple[Tensor, Tensor, Tensor, nn.Linear]:
    """(features [12, 5], labels [12], logits [12, 4], the last layer)."""
    draws = torch.Generator().manual_seed(0)
    head = nn.Linear(5, 4).double()
    for p in head.parameters():
        nn.init.normal_(p, generator=draws)
    features = torch.randn(12, 5, dtype=torch.float64, generator=draws)
    return features, torch.randint(4, (12,), generator=draws), head(features).detach(), head


def test_el2n() -> None:
    _, labels, logits, _ = outputs()
    for row, label, found in zip(logits.tolist(), labels.tolist(), scores.el2n(logits, labels).tolist(), strict=True):
        total = sum(math.exp(x) for x in row)
        errors = [math.exp(x) / total - (k == label) for k, x in enumerate(row)]
        assert found == pytest.approx(math.sqrt(sum(e * e for e in errors)))


def test_grand_is_the_gradient_norm_of_the_last_layer() -> None:
    features, labels, logits, head = outputs()
    found = scores.grand(logits, labels, features)
    for k in range(12):
        loss = F.cross_entropy(head(features[k : k + 1]), labels[k : k + 1])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(head.parameters()))])
        torch.testing.assert_close(found[k], gradient.norm())


def test_confidence_margin() -> None:
    logits = outputs()[2]
    share = numpy.exp(logits.numpy())
    share = numpy.sort(share / share.sum(axis=1, keepdims=True), axis=1)
    numpy.testing.assert_allclose(scores.confidence_margin(logits).numpy(), share[:, -2] - share[:, -1])


def test_boundary_margin_is_the_shortest_way_to_the_boundary() -> None:
    features, labels, logits, head = outputs()
    found = scores.boundary_margin(logits, labels, head.weight.detach())
    for k in range(12):
        rival = max((c for c in range(4) if c != labels[k]), key=lambda c: float(logits[k, c]))
        normal = (head.weight[labels[k]] - head.weight[rival]).detach().numpy()
        gap = float(logits[k, labels[k]] - logits[k, rival])
        way, *_ = numpy.linalg.lstsq(normal[None], numpy.array([-gap]), rcond=None)  # the shortest solution
        moved = head(features[k] + torch.from_numpy(way))
        torch.testing.assert_close(moved[labels[k]], moved[rival])
        assert float(found[k]) == pytest.approx(-float(numpy.linalg.norm(way)))


def test_forgetting() -> None:
    history = torch.rand(40, 9, generator=torch.Generator().manual_seed(0)) < 0.4  # 40 samples, 9 epochs
    history[3] = False
    counter = scores.Forgetting(40)
    for epoch in range(9):
        for index in torch.split(torch.randperm(40), 7):
            counter.see(index, history[index, epoch])
    for row, found in zip(history.tolist(), counter.scores().tolist(), strict=True):
        falls = "".join("1" if right else "0" for right in row).count("10")
        assert found == (falls if any(row) else math.inf)
    assert 0 in counter.scores() and counter.scores().isinf().any()


def test_the_lowest_scores_are_pruned_and_equal_ones_at_random() -> None:
    values = torch.tensor([3.0, 1.0, math.inf, 2.0, 0.0])
    assert scores.kept(values, 0.4, seeded(0)).tolist() == [0, 2, 3]
    equal = [tuple(scores.kept(torch.zeros(6), 0.5, seeded(k)).tolist()) for k in range(200)]
    assert len(set(equal)) == 20 and all(len(chosen) == 3 for chosen in equal)


def test_findings() -> None:
    #                       0      1      2      3      4      5      6      7: copy of 4, 6 copy of 5
    wrong = torch.tensor([True, True, False, False, False, False, False, False])
    twin = torch.tensor([-1, -1, -1, -1, 7, 6, 5, 4])
    truth = Truth(wrong, twin, torch.arange(8) >= 6)
    found = findings(truth, torch.tensor([1, 2, 3, 5]))  # 0, 4, 6, 7 are pruned
    assert found == {"wrong_among_pruned": 0.25, "wrong_found": 0.5, "pairs_reduced": 1.0, "pairs_lost": 0.5}
    assert findings(None, torch.tensor([0])) == {}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_resnets_are_those_of_the_literature() -> None:
    """Parameter counts of torchvision's for ImageNet, of the usual CIFAR-10 variant, and shapes at both sizes."""
    assert count(new_model("resnet18", 3, 224, 1000)) == 11_689_512
    assert count(new_model("resnet50", 3, 224, 1000)) == 25_557_032
    assert count(new_model("resnet18", 3, 32, 10)) == 11_173_962
    with torch.no_grad():
        large = new_model("resnet50", 3, 224, 7).eval()
        images, shapes = torch.zeros(1, 3, 64, 64), []
        for layer in large.body:  # type: ignore[union-attr]
            images = layer(images)
            shapes.append(images.shape[-1])
        assert images.shape == (1, 2048) and shapes[-3] == 2  # by 32: 7 of 224
        assert new_model("resnet18", 3, 32, 7).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_batch_norm_blocks_start_as_they_should(name: str) -> None:
    torch.manual_seed(0)
    model = new_model(name, 1, 28, 10)
    logits = model(torch.randn(8, 1, 28, 28))
    assert logits.shape == (8, 10) and logits.isfinite().all() and 0.01 < logits.std() < 10


def tiny(samples: int = 40, size: int = 8) -> Dataset:
    draws = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (samples, 1, size, size), dtype=torch.uint8, generator=draws)
    labels = torch.randint(3, (samples,), generator=draws)
    mean, std = torch.tensor([0.5]), torch.tensor([0.3])
    images = InMemoryImages(pixels, labels, mean, std, False, torch.device("cpu"))
    return Dataset("tiny", images, images, 3, 1, size)


SETTINGS = Settings(batch_size=10, epochs=4, search_epochs=3, averaged_epochs=2)


def test_learning_rates() -> None:
    seen: list[float] = []

    class Watched(Trainer):
        def after_step(self, index: Tensor, logits: Tensor) -> None:
            seen.append(self.optimizer.param_groups[0]["lr"])

    for schedule in ("cosine", "steps"):
        seen.clear()
        settings = Settings(batch_size=20, epochs=6, lr=0.4, schedule=schedule)
        trainer = Watched(tiny(), settings, 0, 6)
        for _ in range(6):
            trainer.run_epoch()
        if schedule == "steps":
            assert seen == pytest.approx([0.4] * 4 + [0.04] * 4 + [0.004] * 4)
        else:
            assert seen == pytest.approx([0.2 * (1 + math.cos(math.pi * k / 12)) for k in range(12)])


def test_full_training_counts_what_it_forgets() -> None:
    history: list[dict[int, bool]] = []

    class Watched(FullTraining):
        def after_step(self, index: Tensor, logits: Tensor) -> None:
            super().after_step(index, logits)
            history[-1].update((k, bool(logits[n].argmax() == labels[k])) for n, k in enumerate(index.tolist()))

    trainer = Watched(tiny(), SETTINGS, 0)
    labels = trainer.data.train.labels
    for _ in range(4):
        history.append({})
        trainer.run_epoch()
    falls = ["".join(str(int(epoch[k])) for epoch in history) for k in range(40)]
    expected = [row.count("10") if "1" in row else math.inf for row in falls]
    assert trainer.forgetting.scores().tolist() == expected


def test_sama_scores_are_the_weights_of_the_last_epochs() -> None:
    data = tiny()
    untrained = SamaSearch(data, Settings(batch_size=10, search_epochs=3, averaged_epochs=2, meta_lr=1e-30), 0)
    search = SamaSearch(data, Settings(batch_size=10, search_epochs=3, averaged_epochs=2, meta_lr=1e-2), 0)
    seen: list[dict[int, float]] = []
    forward = search.weight_net.forward
    losses_of = {}

    def watched(losses: Tensor, evidence: Tensor) -> Tensor:
        weights = forward(losses, evidence)
        losses_of[tuple(losses.tolist())] = weights.detach()
        return weights

    search.weight_net.forward = watched  # type: ignore[method-assign]
    for _ in range(3):
        untrained.run_epoch()
        seen.append({})
        search.run_epoch()
    assert torch.equal(untrained.scores(), torch.ones(40)) and untrained.degenerate == 0
    values = search.scores()
    assert values.std() > 1e-4 and (values > 0).all() and (values < 2).all()
    # every sample's score is the mean of two weights that the net gave in a base step
    given = torch.cat(list(losses_of.values()))
    sums = given[:, None] + given[None]
    assert all((sums / 2 - value).abs().min() < 1e-6 for value in values)


def test_averaged_model() -> None:
    search = SamaSearch(tiny(), Settings(batch_size=20, search_epochs=5, average_decay=0.7), 0)
    expected: list[Tensor] = []
    step = search.average.update_parameters

    def watched(model: nn.Module) -> None:
        now = [p.detach().clone() for p in model.parameters()]
        before = expected or now
        expected[:] = [0.7 * a + 0.3 * b for a, b in zip(before, now, strict=True)]
        step(model)

    search.average.update_parameters = watched  # type: ignore[method-assign]
    for _ in range(2):
        search.run_epoch()
    for found, p in zip(search.average.parameters(), expected, strict=True):
        torch.testing.assert_close(found, p)


def test_meta_gradient_of_the_weight_net() -> None:
    """Against second-order autograd: -d/dlambda of <base gradient, lr * meta gradient>, where loss and uncertainty, the
    inputs of the weights, are the numbers that they were in the base step."""
    data = tiny()
    search = SamaSearch(data, Settings(batch_size=10, search_epochs=3, alpha=1e-4, weight_decay=0.0), 0)
    search.run_epoch()
    for module in (search.model, search.average, search.weight_net):
        module.double()
    images, meta_images = (data.train.batch(torch.arange(k, k + 10), None).double() for k in (0, 10))
    labels, meta_labels = data.train.labels[:10], data.train.labels[10:20]
    theta, lam = list(search.model.parameters()), list(search.weight_net.parameters())
    search.meta_optimizer = torch.optim.Adam(lam)  # the state of the old one is of single precision
    with torch.no_grad():
        logits = search.model(images)
        losses = F.cross_entropy(logits, labels, reduction="none")
        uncertainty = (logits.softmax(1) - search.average(images).softmax(1)).square().sum(1).sqrt()
    assert uncertainty.min() > 1e-3

    step = _WeightedStep(search, torch.arange(10), 1.0, images)
    search.optimizer.zero_grad()
    torch.autograd.backward(step.loss())
    torch.testing.assert_close(step.weights, search.weight_net(losses, uncertainty[:, None]))
    search.optimizer.step()

    weights = search.weight_net(losses, uncertainty[:, None])
    base = (weights * F.cross_entropy(search.model(images), labels, reduction="none")).mean()
    g = torch.autograd.grad(base, theta, create_graph=True)
    d = torch.autograd.grad(F.cross_entropy(search.model(meta_images), meta_labels), theta)
    inner = torch.stack([(a * b).sum() for a, b in zip(g, d, strict=True)]).sum()
    expected = [-search.settings.search_lr * x for x in torch.autograd.grad(inner, lam)]

    search._meta_step(step, torch.arange(10, 20), 1.0, meta_images)
    for p, wanted in zip(lam, expected, strict=True):
        assert wanted.norm() > 1e-9 and p.grad is not None
        assert (p.grad - wanted).norm() < 1e-4 * wanted.norm()
