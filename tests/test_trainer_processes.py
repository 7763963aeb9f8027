"""`MetaTrainer` on two processes (DDP, gloo) against one that has the batches of both."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from test_trainer import Setting, parameters

RUNS: dict[str, dict[str, Any]] = {
    "full": {},
    "accumulated": {"arguments": {"gradient_accumulation_steps": 3}},
    "update": {"sama": {"alpha": 0.05, "update_base": True}},
    "unclipped": {"arguments": {"max_grad_norm": 0.0}},
}


def trained(rank: int, world: int, name: str) -> dict[str, Any]:
    options = RUNS[name]
    if world > 1:  # what torchrun sets beside what `run_ranks` does
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "localhost", "29500"
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(7)
        arguments = {"ddp_backend": "gloo"} if world > 1 else {}
        arguments |= {"per_device_train_batch_size": 8 // world, **options.get("arguments", {})}
        setting = Setting(Path(folder), dropout=0.0, **arguments)
        setting.model.double()
        setting.net.double()
        if rank == 1:  # lambda is to be made the same
            for p in setting.net.parameters():
                torch.nn.init.normal_(p)
        trainer = setting.trainer(sama={"alpha": 0.05, "sync": "full", **options.get("sama", {})})
        trainer.train()
        logs = [log["meta_loss"] for log in trainer.state.log_history if "meta_loss" in log]
        wrapped = type(trainer.model_wrapped).__name__
        return {"parameters": parameters(setting), "logs": logs, "steps": trainer.state.global_step, "model": wrapped}


@cache
def alone(name: str) -> dict[str, Any]:
    return trained(0, 1, name)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_does(name: str) -> None:
    expected, found = alone(name), run_ranks(2, trained, name)
    torch.manual_seed(7)
    with tempfile.TemporaryDirectory() as folder:
        start: list[Tensor] = [p.double() for p in parameters(Setting(Path(folder), dropout=0.0))]
    moved = [float((p - q).abs().max()) for p, q in zip(expected["parameters"], start, strict=True)]
    assert max(moved[-4:]) > 1e-5 and max(moved[:-4]) > 1e-3  # lambda, which is the last four, and theta
    for rank in found:
        assert rank["model"] == "DistributedDataParallel" and rank["steps"] == expected["steps"] == 6
        torch.testing.assert_close(rank["parameters"], expected["parameters"], rtol=0, atol=1e-9)
        assert all(map(torch.equal, rank["parameters"], found[0]["parameters"]))
        assert rank["logs"] == pytest.approx(expected["logs"], rel=1e-6) and len(rank["logs"]) == 3


def resumed(rank: int, world: int, folder: str) -> tuple[list[Tensor], list[Tensor]]:
    """What six steps lead to, and three more from the checkpoint of the third."""
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "localhost", "29500"
    found = []
    for resume in (None, f"{folder}/whole/checkpoint-3"):
        torch.manual_seed(7)
        name = "whole" if resume is None else "resumed"
        setting = Setting(Path(folder, name), ddp_backend="gloo", save_strategy="steps", save_steps=3)
        trainer = setting.trainer(meta_optimizer=torch.optim.Adam(setting.net.parameters(), lr=1e-2), meta_every=1)
        trainer.train(resume_from_checkpoint=resume)
        found.append(parameters(setting))
    return found[0], found[1]


def test_two_processes_resume(tmp_path: Path) -> None:
    for whole, again in run_ranks(2, resumed, str(tmp_path)):
        assert all(map(torch.equal, whole, again))
