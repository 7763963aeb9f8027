"""Models other than BERT in `sama-kernels weigh`: a decoder whose tokenizer knows no padding, and T5 (refused)."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from tiny_bert import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast, T5Config, T5Model

from sama_experiments import own_data
from sama_experiments.common.encoder import PretrainedEncoder
from sama_experiments.common.errors import ExperimentError
from sama_experiments.own_data import weights_file


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer with an end-of-text token and none for padding."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<eos>", "[UNK]", *WORDS[5:]])}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="[UNK]")
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    folder = tmp_path / "decoder"
    save_tokenizer(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=12, n_positions=32, n_embd=16, n_layer=2, n_head=2, eos_token_id=0, bos_token_id=0)
    GPT2Model(config).save_pretrained(folder)
    return folder


def test_padding_does_not_matter_to_a_decoder(decoder: Path) -> None:
    encoder = PretrainedEncoder(decoder, None, 12, torch.device("cpu"))
    torch.manual_seed(0)
    model = encoder.classifier(2, "mean").eval()
    texts = ["the film is good", "bad", "a movie"]
    together = model(encoder.encode(texts).batch(torch.arange(3)))
    alone = [model(encoder.encode([text]).batch(torch.arange(1))) for text in texts]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_weigh_with_a_decoder(decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    words = ["the", "a", "film", "is", "movie"]
    rows = [{"text": " ".join([*draw.sample(words, 3), ["bad", "good"][i % 2]]), "label": i % 2} for i in range(60)]
    for name, part in (("train", rows[:40]), ("dev", rows[40:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    out = tmp_path / "weights.csv"
    arguments = ["--train", "train.jsonl", "--clean", "dev.jsonl", "--model", "decoder"]
    files = [part if part.startswith("--") else str(tmp_path / part) for part in arguments]
    command = ["weigh", *files, "--out", str(out), "--epochs", "2", "--batch", "8", "--device", "cpu"]
    assert own_data.main(command) == 2
    assert "cannot cut a GPT2Model into lower and upper layers; use --train-layers all" in capsys.readouterr().err
    assert own_data.main([*command, "--train-layers", "all"]) == 0
    weights = weights_file.read(out, ["0", "1"], ["weight"])["weight"]
    assert len(weights) == 40 and weights.mean() == pytest.approx(1, abs=1e-4)


def test_a_model_with_encoder_and_decoder_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    config = T5Config(vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path)
    with pytest.raises(ExperimentError, match="holds a model with encoder and decoder"):
        PretrainedEncoder(tmp_path, None, 12, torch.device("cpu"))


def test_one_process_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    files = ["--train", "train.csv", "--clean", "dev.csv", "--out", str(tmp_path / "weights.csv")]
    assert own_data.main(["weigh", *files]) == 2
    assert capsys.readouterr().err.startswith("error: this program runs in one process")
