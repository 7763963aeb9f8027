"""Two runs from one checkpoint give the same bits: here one goes on, the other resumes in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sama_kernels as sk

SEED = 20_240


class Training:
    """A bfloat16 model under Adam with a learning rate schedule, and learned weights of its examples."""

    def __init__(self) -> None:
        torch.manual_seed(SEED)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1)).bfloat16()
        self.lam = torch.zeros(32, 1, requires_grad=True)
        self.x, self.y = torch.randn(32, 8).bfloat16(), torch.randn(32, 1).bfloat16()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.02)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, gamma=0.8)
        self.meta_optimizer = torch.optim.Adam([self.lam], lr=0.1)

    def base_loss(self) -> Tensor:
        return (self.lam.sigmoid() * (self.net(self.x) - self.y).float().square()).mean()

    def epoch(self, number: int) -> None:
        torch.manual_seed(number)  # as some loops do: it must not move the roundings
        for _ in range(3):
            self.optimizer.zero_grad()
            self.base_loss().backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.schedule.step()
            self.meta_optimizer.zero_grad()
            sk.meta_backward(
                self.base_loss, lambda: (self.net(self.x).float() - 1).square().mean(), base_params=self.net,
                meta_params=[self.lam], optimizer=self.optimizer, alpha=0.05, rounding="stochastic",
            )  # fmt: skip
            self.meta_optimizer.step()

    def saved(self, with_ours: bool = True) -> dict[str, Any]:
        keep = {"sama": sk.state_dict(self.optimizer)} if with_ours else {}
        return {"net": self.net.state_dict(), "lam": self.lam.detach(), "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(), "meta": self.meta_optimizer.state_dict(), **keep}  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.lam.data.copy_(state["lam"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.meta_optimizer.load_state_dict(state["meta"])
        if "sama" in state:
            sk.load_state_dict(self.optimizer, state["sama"])


def resume(folder: Path) -> None:
    """In a fresh process, with another seed than the one that the first run began with."""
    training = Training()
    torch.manual_seed(SEED + 1)
    training.load(torch.load(folder / "checkpoint.pt", weights_only=True))
    training.epoch(2)
    torch.save(training.saved(), folder / "resumed.pt")


def resumed(folder: Path) -> dict[str, Any]:
    tests, repository = Path(__file__).parent, Path(sk.__file__).parents[1]
    code = (
        f"import sys; sys.path[:0] = [{str(tests)!r}, {str(repository)!r}]; import torch; torch.set_num_threads(1); "
        "from pathlib import Path; import test_checkpoint; test_checkpoint.resume(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
    found: dict[str, Any] = torch.load(folder / "resumed.pt", weights_only=True)
    return found


@pytest.mark.parametrize("with_ours", [True, False])
def test_the_same_bits_after_a_resume(tmp_path: Path, with_ours: bool) -> None:
    training = Training()
    training.epoch(1)
    torch.save(training.saved(with_ours), tmp_path / "checkpoint.pt")
    training.epoch(2)
    expected, found = training.saved(), resumed(tmp_path)
    same = torch.equal(found["lam"], expected["lam"]) and all(
        torch.equal(found["net"][name], p) for name, p in expected["net"].items()
    )
    assert same == with_ours  # without the state the roundings are others: the test can tell
    assert (found["sama"] == expected["sama"]) == with_ours
