"""The noisy-finetuning program from end to end, on a BERT of random weights that is made here."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_bert import make_tiny_bert

from sama_experiments import noisy_finetuning
from sama_experiments.common.batches import shuffled_batches
from sama_experiments.common.encoder import PretrainedEncoder
from sama_experiments.common.memory import peak_bytes
from sama_experiments.data import load_reviews
from sama_experiments.noisy_finetuning.evaluation import typical_step_seconds
from sama_experiments.noisy_finetuning.options import DEFAULT_METHODS, parse

TINY = ["--limit", "200", "--clean", "20", "--steps", "6", "--clean-steps", "4", "--meta-start", "2", "--batch", "8"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return make_tiny_bert(tmp_path_factory.mktemp("tiny_bert"), dropout=0.1)


def run(model_folder, out, *more: str) -> dict:
    status = noisy_finetuning.main(["--model", str(model_folder), "--out", str(out), *TINY, *more])
    assert status == 0
    return json.loads((out / "noisy_finetuning.json").read_text())


def test_whole_program(model_folder, tmp_path, capsys):
    result = run(model_folder, tmp_path, "--seeds", "0", "1")
    table = {row["method"]: row for row in result["table"]}
    assert list(table) == DEFAULT_METHODS and len(table) == 7
    assert table["weak"]["throughput"] == table["weak"]["memory"] == 1
    assert table["sama-rc"]["throughput"] < 1 < table["sama-rc"]["memory"] < 3
    assert {(r["method"], r["seed"]) for r in result["runs"]} == {(m, s) for m in table for s in (0, 1)}
    assert all(0 <= r["accuracy"] <= 1 and r["degenerate_meta_steps"] == 0 for r in result["runs"])
    assert result["options"]["settings"]["alpha"] > 0 and result["versions"]["torch"] == torch.__version__
    assert (tmp_path / "noisy_finetuning.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "SAMA, reweighting" in printed and "weak labels" in printed


def test_same_seed_same_result(model_folder, tmp_path):
    one, two = (run(model_folder, tmp_path / name, "--methods", "sama-rc", "--seeds", "5")["runs"][0] for name in "ab")
    assert one["accuracy"] == two["accuracy"] and one["learned"] == two["learned"]


def test_all_layers_paper_preset_on_a_wrench_folder(model_folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name, count in (("train", 40), ("valid", 12), ("test", 12)):
        records = {
            str(i): {
                "data": {"text": "a good film" if i % 2 else "bad movie"},
                "label": i % 2,
                "weak_labels": [i % 2, -1],
            }
            for i in range(count)
        }
        (data / f"{name}.json").write_text(json.dumps(records))
    (data / "label.json").write_text('{"0": "bad", "1": "good"}')
    arguments = ["--data", str(data), "--model", str(model_folder), "--out", str(tmp_path), "--steps", "12"]
    status = noisy_finetuning.main(["--paper", *arguments, "--max-tokens", "8", "--seeds", "0", "--alpha", "0.01"])
    assert status == 0
    result = json.loads((tmp_path / "noisy_finetuning.json").read_text())
    settings = result["options"]["settings"]
    assert settings["base_lr"] == settings["meta_lr"] == 1e-5 and settings["unroll"] == 10 and settings["update_base"]
    assert settings["alpha"] == 0.01 and not settings["clean_in_base"] and result["options"]["train_layers"] is None
    assert [row["method"] for row in result["table"]] == ["weak", "sama-na-r", "sama-na-rc", "sama-r", "sama-rc"]


def test_upper_layers_over_cached_lower_ones_are_the_same_model(model_folder):
    texts = ["the film is good", "a bad bad movie is a bad film", "movie"]
    outputs = []
    for layers in (None, 1, 2, 3):
        encoder = PretrainedEncoder(model_folder, layers, 12, torch.device("cpu"))
        encoded = encoder.encode(texts)
        torch.manual_seed(0)
        classifier = encoder.classifier(2, "mean").eval()
        outputs.append(classifier(encoded.batch(torch.tensor([2, 0, 1]))))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=5e-3, rtol=0)  # hidden states are kept in float16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "no model folder nowhere"),
        (["--model", "."], "has no config.json"),
        (["--data", "nowhere"], "no data folder nowhere"),
        (["--clean", "1000", "--limit", "100"], "--clean 1000: the dev split has only"),
        (["--steps", "4", "--limit", "200", "--clean", "20"], "--steps 4: weak-clean needs more than --clean-steps"),
        (["--train-layers", "9", "--limit", "100"], "--train-layers 9: the model has only 3 layers"),
    ],
)
def test_errors_are_one_line(model_folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert noisy_finetuning.main(["--model", str(model_folder), "--out", "out", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_validation_scores_leave_the_clean_labels_out(model_folder):
    from sama_experiments.noisy_finetuning.experiment import Experiment

    options = parse(TINY)
    encoder = PretrainedEncoder(model_folder, 1, 12, torch.device("cpu"))

    class Quiet:
        def stage(self, title, total): ...
        def advance(self, units=1): ...

    experiment = Experiment(load_reviews(200), encoder, options.settings, "validation", Quiet())
    task, other = experiment.task(0), experiment.task(1)
    assert not set(task.clean_index.tolist()) & set(task.scored_index.tolist())
    assert len(task.clean_index) == 20 and not torch.equal(task.clean_index, other.clean_index)


def test_batches_are_full_and_cover_everything():
    lengths = torch.arange(20).flip(0)
    batches = shuffled_batches(torch.arange(10, 20), lengths, 3, torch.Generator().manual_seed(0))
    seen = [next(batches) for _ in range(6)]
    assert all(len(batch) == 3 for batch in seen)
    assert len(set(torch.cat(seen[:3]).tolist())) == 9
    assert len(next(shuffled_batches(torch.arange(4), lengths, 32, torch.Generator()))) == 4


def test_texts_of_a_batch_have_about_one_length():
    lengths = torch.arange(64)
    batches = shuffled_batches(torch.arange(64), lengths, 8, torch.Generator().manual_seed(0))
    for _ in range(8):
        batch = lengths[next(batches)]
        assert batch.max() - batch.min() == 7


def test_peak_bytes_counts_what_is_alive_at_one_time():
    def work() -> None:
        first = torch.zeros(100_000)
        view = first[10:]
        del first
        second = torch.zeros(50_000)
        del view, second
        torch.zeros(120_000)

    def leaves_a_cycle() -> None:
        cycle = [torch.zeros(80_000)]
        cycle.append(cycle)

    peak_bytes(leaves_a_cycle, torch.device("cpu"))
    size, measure = peak_bytes(work, torch.device("cpu"))
    assert size == 4 * 150_000 and "allocator" in measure


def test_program_list():
    listed = subprocess.run([sys.executable, "-m", "sama_experiments"], capture_output=True, text=True, check=True)
    assert "noisy_finetuning" in listed.stdout


def test_typical_step_time_ignores_a_pause_of_the_machine():
    settings = parse(["--meta-start", "4", "--unroll", "2"]).settings
    times = [9.0] * 4 + [1.0, 3.0] * 10
    assert typical_step_seconds(times, settings) == 2.0
    times[7] = times[10] = 50.0
    assert typical_step_seconds(times, settings) == 2.0
    assert typical_step_seconds([1.0, 2.0], settings) == 1.5
