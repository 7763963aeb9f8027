"""Masks, heads, metrics and memory of continued pretraining, each against an independent formula."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_bert import WORDS, make_tiny_bert

from sama_experiments.common.encoder import PretrainedEncoder
from sama_experiments.common.errors import ExperimentError
from sama_experiments.continued_pretraining import memory
from sama_experiments.continued_pretraining.language_head import fit_language_head
from sama_experiments.continued_pretraining.masking import IGNORED, MaskedCorpus, mask_tokens
from sama_experiments.continued_pretraining.memory import measure, parse_size
from sama_experiments.continued_pretraining.metrics import auc, metric_for, score
from sama_experiments.continued_pretraining.model import MultitaskModel, new_language_head, pretrained_language_head
from sama_experiments.continued_pretraining.paper_results import TABLE_3, paper_scores

TEXTS = {"own": ["the film is good", "a bad bad movie is a bad film", "movie"], "other": ["the good is bad", "a film"]}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_tiny_bert(tmp_path_factory.mktemp("tiny_bert"), dropout=0.1)


def test_masks_take_their_share():
    ids = torch.randint(5, 100, (200, 40))
    maskable = torch.rand(ids.shape) < 0.8
    maskable[0] = False
    maskable[1] = torch.arange(40) < 2
    masked, targets = mask_tokens(ids, maskable, 0.15, 4, 100, torch.Generator().manual_seed(0))
    chosen = targets != IGNORED
    count = maskable.sum(dim=1)
    expected = [max(1, round(0.15 * n)) if n else 0 for n in count.tolist()]
    assert chosen.sum(dim=1).tolist() == expected and not (chosen & ~maskable).any()
    assert torch.equal(targets[chosen], ids[chosen]) and torch.equal(masked[~chosen], ids[~chosen])
    hidden = (masked[chosen] == 4).double().mean().item()
    same = (masked[chosen] == ids[chosen]).double().mean().item()
    assert abs(hidden - 0.8) < 0.05 and abs(same - 0.1) < 0.04
    again = mask_tokens(ids, maskable, 0.15, 4, 100, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], masked) and torch.equal(again[1], targets)


@pytest.mark.parametrize("layers", [None, 1])
def test_masked_loss_is_the_cross_entropy_of_the_masked_tokens(model_folder, layers):
    """Against a loop over texts and tokens, through the whole encoder on the masked text."""
    encoder = PretrainedEncoder(model_folder, layers, 12, CPU)
    corpus = MaskedCorpus(encoder, TEXTS, 0.3, 1 if layers is None else 2, 0)
    assert len(corpus.lengths) == (5 if layers is None else 10)
    assert corpus.domain.tolist()[:5] == [0, 0, 0, 1, 1]
    torch.manual_seed(1)
    model = MultitaskModel(encoder, 2, "mean", new_language_head(encoder)).eval()
    rows = torch.tensor([4, 1, 3])
    batch = corpus.batch(rows, torch.Generator().manual_seed(3))
    losses = model.masked_losses(batch.inputs, batch.targets)
    ids = batch.inputs["input_ids"] if layers is None else corpus.rows.tokens["input_ids"][rows]
    ids = ids[:, : batch.targets.shape[1]]
    mask = (ids != WORDS.index("[PAD]")).long()
    states = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
    embeddings, head = encoder.model.get_input_embeddings().weight, model.language_head
    for i in range(3):
        each = []
        for j, target in enumerate(batch.targets[i].tolist()):
            if target != IGNORED:
                logits = head.norm(F.gelu(head.dense(states[i, j]))) @ embeddings.T + head.bias
                each.append(-logits.log_softmax(dim=0)[target])
        torch.testing.assert_close(losses[i], torch.stack(each).mean(), atol=5e-3, rtol=0)


def test_decoder_is_tied_to_the_embeddings_where_these_are_trained(model_folder):
    tied = PretrainedEncoder(model_folder, None, 12, CPU)
    model = MultitaskModel(tied, 2, "mean", new_language_head(tied))
    corpus = MaskedCorpus(tied, TEXTS, 0.3, 1, 0)
    batch = corpus.batch(torch.arange(5), torch.Generator())
    model.masked_losses(batch.inputs, batch.targets).sum().backward()
    gradient = model.encoder.get_input_embeddings().weight.grad
    unseen = WORDS.index("[UNK]")  # in no text: only the decoder reads it
    assert gradient[unseen].abs().sum() > 0
    frozen = PretrainedEncoder(model_folder, 1, 12, CPU)
    names = MultitaskModel(frozen, 2, "mean", new_language_head(frozen)).state_dict()
    assert not any("embeddings" in name for name in names)


def test_frozen_layers_get_masks_that_stay_and_others_new_ones(model_folder):
    rows = torch.arange(5)
    for layers, stay in ((1, True), (None, False)):
        encoder = PretrainedEncoder(model_folder, layers, 12, CPU)
        corpus = MaskedCorpus(encoder, TEXTS, 0.3, 1, 0)
        draws = [corpus.batch(rows, torch.Generator().manual_seed(seed)).targets for seed in range(6)]
        assert all(torch.equal(draw, draws[0]) for draw in draws) == stay


def test_pretrained_head_is_found_and_its_absence_too(model_folder, tmp_path):
    encoder = PretrainedEncoder(model_folder, 1, 12, CPU)
    assert pretrained_language_head(encoder, model_folder) is None
    for name, config_type, model_type in (
        ("bert", transformers.BertConfig, transformers.BertForMaskedLM),
        ("roberta", transformers.RobertaConfig, transformers.RobertaForMaskedLM),
        ("distilbert", transformers.DistilBertConfig, transformers.DistilBertForMaskedLM),
    ):
        config = config_type(
            vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=64,
        )  # fmt: skip
        whole = model_type(config).eval()
        for parameter in whole.parameters():  # biases begin as zeros: then a lost one would not show
            parameter.data += 0.1 * torch.randn_like(parameter)
        whole.save_pretrained(tmp_path / name)
        encoder.tokenizer.save_pretrained(tmp_path / name)
        mine = PretrainedEncoder(tmp_path / name, None, 12, CPU)
        head = pretrained_language_head(mine, tmp_path / name)
        ids = torch.tensor([[2, 5, 7, 3]])
        hidden = mine.model(input_ids=ids).last_hidden_state[0]
        embeddings = mine.model.get_input_embeddings().weight
        torch.testing.assert_close(head(hidden, embeddings), whole(input_ids=ids).logits[0])


def test_fitting_a_head_leaves_the_encoder_alone(model_folder):
    encoder = PretrainedEncoder(model_folder, 1, 12, CPU)
    before = copy.deepcopy(encoder.trained.state_dict())
    corpus = MaskedCorpus(encoder, TEXTS, 0.3, 4, 0)
    torch.manual_seed(0)
    untrained = MultitaskModel(encoder, 2, "mean", new_language_head(encoder)).eval()
    steps = []
    head = fit_language_head(encoder, corpus, 200, 0, lambda: steps.append(1))
    fitted = MultitaskModel(encoder, 2, "mean", head).eval()
    batch = corpus.batch(torch.arange(20), torch.Generator())
    losses = [m.masked_losses(batch.inputs, batch.targets).mean().item() for m in (untrained, fitted)]
    assert losses[1] < losses[0] - 0.1 and len(steps) == 200
    assert all(torch.equal(value, before[name]) for name, value in encoder.trained.state_dict().items())


@pytest.mark.parametrize("seed", range(4))
def test_f1_and_accuracy_by_counting(seed):
    draw = random.Random(seed)
    labels, guesses = ([draw.randrange(4) for _ in range(30)] for _ in range(2))
    labels = [0 if label == 3 else label for label in labels]  # class 3 is only predicted
    each = []
    for c in range(5):  # class 4 is neither there nor predicted
        right = sum(a == b == c for a, b in zip(labels, guesses, strict=True))
        precision = right / guesses.count(c) if c in guesses else 0
        recall = right / labels.count(c) if c in labels else 0
        each.append(2 * precision * recall / (precision + recall) if right else 0)
    found = [score(metric, torch.tensor(guesses), torch.tensor(labels), 5) for metric in ("macro-f1", "micro-f1")]
    assert found == pytest.approx([sum(each) / 5, sum(a == b for a, b in zip(labels, guesses, strict=True)) / 30])
    with pytest.raises(ExperimentError, match="--metric recall"):
        score("recall", torch.tensor(guesses), torch.tensor(labels), 5)


@pytest.mark.parametrize("seed", range(4))
def test_auc_by_counting_pairs(seed):
    draw = random.Random(seed)
    scores = [draw.randrange(6) / 5 for _ in range(25)]
    own = [draw.random() < 0.4 for _ in range(25)]
    mine = [a for a, x in zip(scores, own, strict=True) if x]
    others = [a for a, x in zip(scores, own, strict=True) if not x]
    pairs = [(a > b) + (a == b) / 2 for a in mine for b in others]
    assert auc(torch.tensor(scores), torch.tensor(own)) == pytest.approx(sum(pairs) / len(pairs))


def test_metric_and_paper_figures_by_data_set():
    assert [metric_for(n) for n in ("chemprot", "sciie", "movie reviews")] == ["micro-f1", "macro-f1", "accuracy"]
    assert paper_scores("citation_intent") == ("acl-arc", TABLE_3["acl-arc"])
    assert paper_scores("movie reviews")[0] == "average"
    for method in ("finetune", "dapt", "tartan-mt", "sama"):  # the printed averages fit the printed columns
        columns = [TABLE_3[name][method] for name in TABLE_3 if name != "average"]
        assert TABLE_3["average"][method] == pytest.approx(sum(columns) / 4, abs=0.011)


def test_memory_of_algorithms(monkeypatch):
    monkeypatch.setattr(memory, "VOCABULARY", 1000)
    told = []
    points = measure(["finetune", "tartan-mt", "sama", "neumann"], ["1x64"], CPU, told.append)
    used = {point.algorithm: point.bytes for point in points}
    assert told == points and {point.parameters for point in points} == {points[0].parameters}
    # parameters, gradients and Adam's two moments are there in all; SAMA adds the perturbation at most, Neumann graphs
    assert used["finetune"] > 4 * 4 * points[0].parameters
    assert used["finetune"] <= used["tartan-mt"] <= used["sama"] < used["neumann"]
    for wrong in ("64", "0x64", "2x100", "2x64x1"):
        with pytest.raises(ExperimentError, match="--memory-sizes"):
            parse_size(wrong)
