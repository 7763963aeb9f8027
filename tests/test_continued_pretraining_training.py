"""What one step of each method of continued pretraining does to which parameters, without dropout."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_bert import make_tiny_bert

from sama_experiments.common.encoder import PretrainedEncoder
from sama_experiments.continued_pretraining.masking import MaskedCorpus
from sama_experiments.continued_pretraining.methods import METHODS, Settings
from sama_experiments.continued_pretraining.model import MultitaskModel, new_language_head
from sama_experiments.continued_pretraining.training import LabelledRows, Task, TextWeights, Trainer

TEXTS = ["the film is good", "a bad bad movie is a bad film", "movie", "the good is bad", "a film", "good good film"]
SETTINGS = replace(
    Settings(), batch_size=3, auxiliary_batch_size=3, meta_batch_size=3, meta_start=2, auxiliary_weight=0.5, warmup=0.0
)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    encoder = PretrainedEncoder(
        make_tiny_bert(tmp_path_factory.mktemp("bert"), dropout=0.0), 1, 12, torch.device("cpu")
    )
    corpus = MaskedCorpus(encoder, {"own": TEXTS[:3], "other": TEXTS[3:]}, 0.3, 2, 0)
    torch.manual_seed(0)
    head = new_language_head(encoder)
    labelled = LabelledRows(encoder.encode(TEXTS), torch.tensor([1, 0, 1, 0, 1, 0]), torch.arange(6))
    evidence = {"features": corpus.features(), "domain": F.one_hot(corpus.domain, 2).float()}
    return Task(labelled, labelled, labelled, corpus, evidence, 6, lambda: MultitaskModel(encoder, 2, "mean", head))


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.named_parameters()}


def trained(task, method: str, steps: int, settings=SETTINGS) -> Trainer:
    trainer = Trainer(task, METHODS[method], settings, 0)
    for _ in range(steps):
        trainer.step()
    return trainer


def test_multitask_gradient_is_the_sum_of_both(task):
    trainer, again = (Trainer(task, METHODS["tartan-mt"], SETTINGS, 0) for _ in range(2))
    before = again.model
    trainer.step()
    rows, labelled = next(again.auxiliary_batches), next(again.train_batches)
    batch = task.corpus.batch(rows, torch.Generator())
    loss = F.cross_entropy(before(task.train.texts.batch(labelled)), task.train.labels[labelled])
    loss = loss + 0.5 * before.masked_losses(batch.inputs, batch.targets).mean()
    expected = torch.autograd.grad(loss, list(before.parameters()))
    for parameter, gradient in zip(trainer.model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_sama_is_tartan_mt_until_its_first_meta_step(task):
    for method in ("sama-loss", "sama", "sama-dev", "sama-domain", "sama-na"):
        until = [parameters(trained(task, key, 3)) for key in ("tartan-mt", method)]  # the third ends with a meta step
        for name, value in until[0].items():
            torch.testing.assert_close(until[1][name], value)
    after = [parameters(trained(task, key, 6)) for key in ("tartan-mt", "sama")]
    assert any(not torch.equal(after[1][name], value) for name, value in after[0].items())


def test_update_base_moves_the_model_in_a_meta_step(task):
    moved = [parameters(trained(task, "sama", 3, replace(SETTINGS, update_base=update))) for update in (False, True)]
    distance = sum((moved[1][name] - value).pow(2).sum() for name, value in moved[0].items()).sqrt()
    torch.testing.assert_close(distance, torch.tensor(SETTINGS.alpha), rtol=1e-3, atol=0)


def test_finetuning_leaves_the_language_head_and_pretraining_the_classifier(task):
    start = parameters(Trainer(task, METHODS["dapt"], SETTINGS, 0))
    finetuned, pretrained = parameters(trained(task, "finetune", 6)), trained(task, "dapt", 6)
    middle = parameters(pretrained)
    assert torch.equal(finetuned["language_head.bias"], start["language_head.bias"])
    assert torch.equal(middle["head.weight"], start["head.weight"])
    assert not torch.equal(middle["language_head.bias"], start["language_head.bias"])
    assert pretrained.steps == 12
    for _ in range(6):
        pretrained.step()
    end = parameters(pretrained)
    assert torch.equal(end["language_head.bias"], middle["language_head.bias"])
    assert not torch.equal(end["head.weight"], middle["head.weight"])


def test_all_methods_see_the_same_batches(task):
    trainers = [Trainer(task, METHODS[key], SETTINGS, 5) for key in ("finetune", "dapt", "tartan-mt", "sama")]
    for _ in range(5):
        drawn = [(next(t.train_batches), next(t.auxiliary_batches)) for t in trainers]
        for labelled, auxiliary in drawn:
            assert torch.equal(labelled, drawn[0][0]) and torch.equal(auxiliary, drawn[0][1])
    own = Trainer(task, METHODS["tartan-mt-own"], SETTINGS, 5)
    assert all((task.corpus.domain[next(own.auxiliary_batches)] == 0).all() for _ in range(5))


@pytest.mark.parametrize("key", ["dapt", "sama"])
def test_resumed_trainer_goes_on_alike(task, key):
    straight, first = trained(task, key, 5), trained(task, key, 3)
    resumed = Trainer(task, METHODS[key], SETTINGS, 0)
    resumed.resume(first.state())
    for _ in range(2):
        resumed.step()
    for name, value in parameters(straight).items():
        torch.testing.assert_close(parameters(resumed)[name], value)


def test_weights_begin_at_one_and_keep_their_mean():
    evidence, rows, losses = torch.randn(8, 3), torch.tensor([6, 1, 2]), torch.tensor([0.5, 3.0, 7.0])
    for mean_one in (False, True):
        weigh = TextWeights(evidence, 4, mean_one)
        torch.testing.assert_close(weigh(losses, rows), torch.ones(3))
        torch.nn.init.normal_(weigh.net.net[2].weight)
        torch.nn.init.constant_(weigh.net.net[2].bias, 1.0)
        weights = weigh(losses, rows)
        assert not torch.allclose(weights, torch.ones(3), atol=0.01)
        assert torch.isclose(weights.mean(), torch.tensor(1.0)) == mean_one
