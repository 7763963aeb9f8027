"""`MetaTrainer`: transformers' own loop makes the base steps; held against a loop written out by hand."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sama_kernels as sk

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from sama_kernels.integrations.endless import EndlessBatches  # noqa: E402
from sama_kernels.integrations.trainer_checks import check_parallelism  # noqa: E402
from sama_kernels.integrations.transformers import MetaTrainer  # noqa: E402


def bert(dropout: float = 0.1) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)  # type: ignore[no-any-return]


def samples(count: int) -> list[dict[str, Tensor]]:
    return [
        {"input_ids": torch.randint(1, 60, (7,)), "labels": torch.randint(3, ()), "row": torch.tensor(i)}
        for i in range(count)
    ]


class Setting:
    """A model, its data, and what `MetaTrainer` takes beside them."""

    def __init__(self, folder: Path, dropout: float = 0.1, **arguments: Any) -> None:
        self.train, self.clean = samples(24), samples(7)
        self.model, self.net = bert(dropout), nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid())
        options: dict[str, Any] = {
            "output_dir": str(folder), "per_device_train_batch_size": 4, "learning_rate": 1e-3, "max_steps": 6,
            "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 5, "logging_steps": 2,
            "save_strategy": "no", "max_grad_norm": 0.05,
        }  # fmt: skip
        self.args = transformers.TrainingArguments(**(options | arguments))
        self.seen: list[Tensor] = []

    def base_loss(self, model: nn.Module, inputs: Any) -> Tensor:
        labels = inputs.pop("labels")  # as many losses written for a Trainer do
        self.seen.append(inputs["input_ids"])
        losses = F.cross_entropy(model(**inputs).logits, labels, reduction="none")
        weights = self.net(sk.stop_gradient(losses)[:, None]).squeeze(1)
        return (weights * losses).mean()

    def trainer(self, **kwargs: Any) -> MetaTrainer:
        arguments: dict[str, Any] = {
            "meta_optimizer": torch.optim.SGD(self.net.parameters(), lr=0.5), "meta_every": 2,
            "sama": {"alpha": 0.05},
        }  # fmt: skip
        return MetaTrainer(
            model=self.model, args=self.args, train_dataset=self.train, base_loss=self.base_loss,
            meta_model=self.net, meta_dataset=self.clean, **(arguments | kwargs),
        )  # fmt: skip


def parameters(setting: Setting) -> list[Tensor]:
    return [p.detach().clone() for p in (*setting.model.parameters(), *setting.net.parameters())]


@pytest.mark.parametrize("accumulated", [1, 3])
def test_it_is_the_loop_that_one_would_write(tmp_path: Path, accumulated: int) -> None:
    """Same batches, same steps, without dropout: theta and lambda of a loop in plain PyTorch around `meta_backward`."""
    setting = Setting(tmp_path, dropout=0.0, gradient_accumulation_steps=accumulated, lr_scheduler_type="constant")
    setting.model.double()
    setting.net.double()
    model, net = copy.deepcopy((setting.model, setting.net))
    trainer = setting.trainer()
    drawn: list[list[int]] = []
    order = trainer._batches
    for rows, _ in zip(order, range(3), strict=False):
        drawn.append(rows)
    trainer.train()
    assert trainer._drawn == 3

    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": group["weight_decay"]} for group, p in of_groups(trainer, setting, model)],
        lr=1e-3, betas=(0.9, 0.999), eps=1e-8,
    )  # fmt: skip
    meta_optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    labels = {tuple(row["input_ids"].tolist()): row["labels"] for row in setting.train}
    batches = ordinary_calls(setting, accumulated)
    assert len(batches) == 6 * accumulated

    def loss_of(ids: Tensor) -> Tensor:
        y = torch.stack([labels[tuple(row.tolist())] for row in ids])
        losses = F.cross_entropy(model(input_ids=ids).logits, y, reduction="none")
        return (net(sk.stop_gradient(losses)[:, None]).squeeze(1) * losses).mean() / accumulated

    for step in range(6):
        micro = batches[step * accumulated : (step + 1) * accumulated]
        optimizer.zero_grad()
        closures = [sk.recorded(functools.partial(loss_of, ids)) for ids in micro]
        for closure in closures:
            closure().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        if step % 2 == 1:
            rows = [setting.clean[i] for i in drawn[step // 2]]
            ids, y = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
            meta_optimizer.zero_grad()
            out = sk.meta_backward(
                closures,
                lambda ids=ids, y=y: F.cross_entropy(model(input_ids=ids).logits, y),  # type: ignore[misc]
                base_params=model, meta_params=net, optimizer=optimizer, alpha=0.05,
                clip_coef=sk.clip_coef(norm, 0.05),
            )  # fmt: skip
            assert not out.degenerate and norm > 0.05
            meta_optimizer.step()
    moved = [
        float((p - q).detach().abs().max()) for p, q in zip(net.parameters(), setting.net.parameters(), strict=True)
    ]
    assert max(moved) < 1e-9
    for p, q in zip(model.parameters(), setting.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def of_groups(trainer: MetaTrainer, setting: Setting, model: nn.Module) -> list[tuple[dict[str, Any], nn.Parameter]]:
    """The parameters of `model`, a copy of the trained one, each with the parameter group of its original."""
    groups = {id(p): group for group in trainer.optimizer.param_groups for p in group["params"]}
    return [(groups[id(q)], p) for q, p in zip(setting.model.parameters(), model.parameters(), strict=True)]


def ordinary_calls(setting: Setting, accumulated: int) -> list[Tensor]:
    """The batches of the base steps, in order: without those that a meta step has evaluated again."""
    calls, found = list(setting.seen), []
    for step in range(6):
        found += calls[:accumulated]
        del calls[: accumulated * (3 if step % 2 == 1 else 1)]  # the held values are recorded: two passes only
    assert not calls
    return found


def test_a_resumed_run_gives_the_same_bits(tmp_path: Path) -> None:
    """With dropout, Adam for lambda and a schedule: six steps, and three, a checkpoint, and three more by a new one."""

    def run(folder: Path, resume: str | None = None, **arguments: Any) -> list[Tensor]:
        torch.manual_seed(3)
        setting = Setting(folder, **arguments)
        adam = torch.optim.Adam(setting.net.parameters(), lr=1e-2)
        trainer = setting.trainer(meta_optimizer=adam, meta_every=1, sama={"alpha": 0.05, "update_base": True})
        trainer.train(resume_from_checkpoint=resume)
        return parameters(setting)

    whole = run(tmp_path / "whole", save_strategy="steps", save_steps=3)
    resumed = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    (tmp_path / "whole" / "checkpoint-3" / "meta.pt").unlink()
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*meta\.pt is missing"):
        run(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-3"))


def test_evaluation_uses_the_models_own_loss(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    trainer = setting.trainer()
    trainer.train()
    calls = len(setting.seen)
    found = trainer.evaluate(setting.clean)["eval_loss"]
    rows = {key: torch.stack([row[key] for row in setting.clean]) for key in ("input_ids", "labels")}
    setting.model.eval()
    with torch.no_grad():
        assert found == pytest.approx(float(setting.model(**rows).loss), rel=1e-5)
    assert len(setting.seen) == calls
    logged = [row for row in trainer.state.log_history if "meta_loss" in row]
    assert len(logged) == 3 and all(row["meta_degenerate"] == 0 and row["meta_loss"] > 0 for row in logged)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"base_loss": None}, TypeError, "base_loss: expected a function"),
        ({"meta_model": [torch.ones(3)]}, TypeError, "meta_model: expected an nn.Module, got list"),
        ({"meta_optimizer": "adam"}, TypeError, "meta_optimizer: expected a torch.optim.Optimizer"),
        ({"meta_optimizer": torch.optim.SGD([torch.ones(1)], lr=1)}, ValueError, "meta_optimizer: it must hold"),
        ({"meta_dataset": iter(())}, TypeError, "meta_dataset: expected a dataset with a length"),
        ({"meta_dataset": []}, ValueError, "meta_dataset: it is empty"),
        ({"meta_every": 0}, ValueError, "meta_every: expected a positive integer, got 0"),
        ({"sama": {"alpa": 1}}, ValueError, "sama: alpa: not among"),
        ({"compute_loss_func": lambda *_: 0}, ValueError, "compute_loss_func: the loss of training is base_loss"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_bad_arguments(tmp_path: Path, changed: dict[str, Any], error: type[Exception], words: str) -> None:
    setting = Setting(tmp_path)
    given = {
        "meta_model": setting.net, "meta_dataset": setting.clean, "base_loss": setting.base_loss,
        "meta_optimizer": torch.optim.SGD(setting.net.parameters(), lr=0.5),
    }  # fmt: skip
    with pytest.raises(error, match=words):
        MetaTrainer(model=setting.model, args=setting.args, train_dataset=setting.train, **(given | changed))


@pytest.mark.parametrize(
    ("gpus", "deepspeed", "axis", "words"),
    [
        (2, False, "", r"nn\.DataParallel.*torchrun"),
        (1, True, "", "DeepSpeed.*fsdp_version 2"),
        (1, False, "cp_enabled", "context and sequence parallelism"),
        (1, False, "sp_enabled", "context and sequence parallelism"),
    ],
)
def test_parallelism_that_is_refused(gpus: int, deepspeed: bool, axis: str, words: str) -> None:
    """With stand-ins for a Trainer, which needs several GPUs to be so."""
    parallelism = SimpleNamespace(cp_enabled=axis == "cp_enabled", sp_enabled=axis == "sp_enabled")
    trainer = SimpleNamespace(
        args=SimpleNamespace(n_gpu=gpus), is_deepspeed_enabled=deepspeed,
        accelerator=SimpleNamespace(parallelism_config=parallelism if axis else None),
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match=f"args: .*{words}"):
        check_parallelism(trainer)


def test_endless_batches() -> None:
    """Every pass has each sample once; the processes divide a batch; batch k does not depend on where one starts."""

    def batches(count: int, **arguments: Any) -> list[list[int]]:
        return [rows for rows, _ in zip(EndlessBatches(7, **arguments), range(count), strict=False)]

    rows = [row for batch in batches(7, size=3, seed=1) for row in batch]
    turns = [rows[i : i + 7] for i in range(0, 21, 7)]
    assert all(sorted(turn) == list(range(7)) for turn in turns) and turns[0] != turns[1]
    assert batches(7, size=3, seed=1)[4:] == batches(3, size=3, seed=1, start=4)
    parts = [batches(3, size=2, seed=1, rank=rank, ranks=2) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(b) for b in batches(3, size=4, seed=1)]
    assert batches(2, size=3, seed=2) != batches(2, size=3, seed=1)


def test_every_trial_of_a_search_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for optuna: two trials with the same settings train the same, with the clipping of each."""
    torch.manual_seed(4)
    setting = Setting(tmp_path, dropout=0.0)
    state = copy.deepcopy(setting.model.state_dict())
    coefficients: list[float] = []
    meta_backward = sk.meta_backward

    def noting(*args: Any, **kwargs: Any) -> Any:
        coefficients.append(float(kwargs["clip_coef"]))
        return meta_backward(*args, **kwargs)

    monkeypatch.setattr(sk, "meta_backward", noting)

    def fresh() -> nn.Module:
        setting.model = bert(0.0)
        setting.model.load_state_dict(state)
        return setting.model

    found: list[list[Tensor]] = []
    trainer = MetaTrainer(
        model_init=fresh, args=setting.args, train_dataset=setting.train, eval_dataset=setting.clean,
        base_loss=setting.base_loss, meta_model=setting.net, meta_dataset=setting.clean, meta_every=2,
        meta_optimizer=torch.optim.SGD(setting.net.parameters(), lr=0.5, momentum=0.9), sama={"alpha": 0.05},
    )  # fmt: skip

    def search(self: Any, *_: Any, **__: Any) -> None:
        self.hp_search_backend, self.hp_space = "optuna", lambda trial: {"seed": 5}
        for _ in range(2):
            trial = SimpleNamespace(params={}, number=0)
            self._hp_search_setup(trial)
            self.train()
            found.append(parameters(setting))

    monkeypatch.setattr(transformers.Trainer, "hyperparameter_search", search)
    trainer.hyperparameter_search(n_trials=2)
    assert len(coefficients) == 6 and coefficients[:3] == coefficients[3:] and max(coefficients) < 1
    assert all(map(torch.equal, *found))


def test_clipping_that_is_not_seen_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(tmp_path)
    trainer = setting.trainer()
    monkeypatch.setattr(trainer, "_clip_grad_norm", lambda model: torch.ones(()))  # as for several device meshes
    with pytest.raises(RuntimeError, match=r"max_grad_norm: .*not clipped by accelerate's.*clip_coef"):
        trainer.train()
