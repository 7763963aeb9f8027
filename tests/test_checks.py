"""Every bad input is one error that names the argument and the cure, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import same_bits
from torch import Tensor, nn

import sama_kernels as sk
from sama_kernels import backends


class Setting:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(4, 1)
        self.lam = torch.rand(6, requires_grad=True)
        self.x = torch.randn(6, 4)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.01)
        for _ in range(2):
            self.optimizer.zero_grad()
            self.base().backward()
            self.optimizer.step()

    def base(self) -> Tensor:
        return (self.lam * self.net(self.x).squeeze(1).square()).mean()

    def meta(self) -> Tensor:
        return (self.net(self.x) - 1).square().mean()

    def run(self, **changes: Any) -> sk.MetaGradient:
        arguments: dict[str, Any] = {
            "base_loss": self.base,
            "meta_loss": self.meta,
            "base_params": self.net,
            "meta_params": [self.lam],
            "optimizer": self.optimizer,
        }
        return sk.meta_grad(**{**arguments, **changes})


class MyAdam(torch.optim.Adam):
    """A subclass may do anything in step(): it must not be taken for Adam."""


def no_grad_loss(s: Setting) -> Tensor:
    with torch.no_grad():
        return s.base()


def cleared(s: Setting) -> dict[str, Any]:
    s.optimizer.zero_grad()
    return {}


def one_cleared(s: Setting) -> dict[str, Any]:
    s.net.bias.grad = None
    return {}


def sparse_embedding(s: Setting) -> dict[str, Any]:
    table = nn.Embedding(5, 1, sparse=True)
    rows = torch.tensor([0, 1, 1, 2, 3, 3])
    return {
        "base_loss": lambda: (s.lam * table(rows).squeeze(1)).mean(),
        "meta_loss": lambda: table(rows).square().mean(),
        "base_params": table,
        "optimizer": torch.optim.SGD(table.parameters(), lr=0.1),
    }


def sparse_meta(s: Setting) -> dict[str, Any]:
    table = nn.Embedding(5, 1, sparse=True)
    rows = torch.tensor([0, 1, 1, 2, 3, 3])
    return {"base_loss": lambda: (table(rows) * s.net(s.x)).mean(), "meta_params": table}


integers = torch.ones(3, dtype=torch.int64)
CASES: dict[str, tuple[Callable[[Setting], dict[str, Any]], type[Exception], str]] = {
    "foreign base parameter": (
        lambda s: {"base_params": [*s.net.parameters(), torch.ones(2, requires_grad=True)]},
        ValueError,
        r"base_params: 1 of 3 tensors are not held by the optimizer.*freeze",
    ),
    "no state": (
        lambda s: {"optimizer": torch.optim.Adam(s.net.parameters())},
        ValueError,
        r"optimizer: it has no state.*base step",
    ),
    "no momentum buffer": (
        lambda s: {"optimizer": torch.optim.SGD(s.net.parameters(), lr=0.1, momentum=0.9)},
        ValueError,
        r"optimizer: it has no state",
    ),
    "no grad": (cleared, ValueError, r"base_params: tensor 0 .*has no \.grad.*before zero_grad"),
    "one grad missing": (one_cleared, ValueError, r"base_params: tensor 1 .*has no \.grad"),
    "vector base loss": (
        lambda s: {"base_loss": lambda: s.lam * s.net(s.x).squeeze(1)},
        ValueError,
        r"base_loss: must return a scalar, got shape \(6,\).*mean",
    ),
    "vector meta loss": (
        lambda s: {"meta_loss": lambda: s.net(s.x)},
        ValueError,
        r"meta_loss: must return a scalar, got shape \(6, 1\)",
    ),
    "detached base loss": (
        lambda s: {"base_loss": lambda: s.base().detach()},
        ValueError,
        r"base_loss: .*meta_params.*detached",
    ),
    "no_grad base loss": (lambda s: {"base_loss": lambda: no_grad_loss(s)}, ValueError, r"base_loss: .*no_grad"),
    "detached meta loss": (
        lambda s: {"meta_loss": lambda: s.meta().detach()},
        ValueError,
        r"meta_loss: .*base_params.*detached",
    ),
    "complex base loss": (
        lambda s: {"base_loss": lambda: s.base() * torch.tensor(1j)},
        TypeError,
        r"base_loss: must return a real .*torch\.complex64.*\.real",
    ),
    "complex meta loss": (
        lambda s: {"meta_loss": lambda: torch.complex(s.meta(), s.meta())},
        TypeError,
        r"meta_loss: must return a real .*torch\.complex64.*\.real",
    ),
    "gradient in the base loss": (
        lambda s: {"base_loss": lambda: s.base() + torch.autograd.grad(s.meta(), s.net.weight)[0].sum()},
        ValueError,
        r"base_loss: it seems to differentiate .*torch\.func\.grad",
    ),
    "one computed from another": (
        lambda s: {"meta_params": [s.lam, s.lam * 2]},
        ValueError,
        r"meta_params: another of these tensors is computed from tensor 0 .*counted twice",
    ),
    "number as loss": (
        lambda s: {"base_loss": lambda: 1.0},
        TypeError,
        r"base_loss: must return a scalar tensor, got float",
    ),
    "meta loss without theta": (
        lambda s: {"meta_loss": lambda: s.lam.sum()},
        ValueError,
        r"meta_loss: it does not read any base parameter",
    ),
    "unread lambda": (
        lambda s: {"base_loss": lambda: s.net(s.x).mean()},
        ValueError,
        r"base_loss: .*meta_params.*does not read them",
    ),
    "unread lambda beside another graph": (
        lambda s: {"meta_params": [torch.ones(2, requires_grad=True)]},
        ValueError,
        r"meta_params: base_loss does not read any",
    ),
    "not closures": (lambda s: {"base_loss": s.base()}, TypeError, r"base_loss: expected a function"),
    "empty list of closures": (lambda s: {"base_loss": []}, TypeError, r"base_loss: expected a function"),
    "meta device": (
        lambda s: {"meta_params": [torch.ones(6, device="meta", requires_grad=True)]},
        ValueError,
        r"one device, got cpu, meta",
    ),
    "complex": (
        lambda s: {"meta_params": [torch.ones(2, dtype=torch.complex64, requires_grad=True)]},
        TypeError,
        r"meta_params: tensor 0 is torch.complex64",
    ),
    "integer": (lambda s: {"meta_params": [integers]}, TypeError, r"meta_params: tensor 0 is torch.int64"),
    "sparse tensor": (
        lambda s: {"meta_params": [torch.eye(2).to_sparse().requires_grad_()]},
        TypeError,
        r"meta_params: tensor 0 has layout",
    ),
    "frozen lambda": (
        lambda s: {"meta_params": [torch.ones(2)]},
        ValueError,
        r"meta_params: tensor 0 does not require grad",
    ),
    "one tensor": (
        lambda s: {"meta_params": s.lam},
        TypeError,
        r"meta_params: expected an nn.Module or an iterable of tensors and modules, got Tensor",
    ),
    "names": (lambda s: {"base_params": ["weight"]}, TypeError, r"base_params: element 0 is a str"),
    "empty": (lambda s: {"base_params": []}, ValueError, r"base_params: no tensor"),
    "frozen module": (
        lambda s: {"base_params": nn.Linear(2, 2).requires_grad_(False)},
        ValueError,
        r"base_params: no tensor that requires grad",
    ),
    "not a leaf": (lambda s: {"base_params": [s.net.weight * 1]}, ValueError, r"base_params: tensor 0 is not a leaf"),
    "expanded": (
        lambda s: {"base_params": [torch.ones(1).expand(3).requires_grad_()]},
        ValueError,
        r"base_params: tensor 0 is expanded",
    ),
    "shared": (lambda s: {"meta_params": s.net}, ValueError, r"meta_params: 2 of these tensors are base_params too"),
    "subclass of Adam": (
        lambda s: {"optimizer": MyAdam(s.net.parameters())},
        TypeError,
        r"optimizer: no adaptation for .*MyAdam.*adaptation=\"none\"",
    ),
    "SparseAdam": (
        lambda s: {"optimizer": torch.optim.SparseAdam(s.net.parameters())},
        TypeError,
        r"optimizer: there is no adaptation for .*SparseAdam: its gradient is sparse.*sparse=False",
    ),
    "no optimizer": (lambda s: {"optimizer": None}, TypeError, r"optimizer: expected the torch.optim.Optimizer"),
    "alpha zero": (lambda s: {"alpha": 0.0}, ValueError, r"alpha: must be positive and finite, got 0"),
    "alpha negative": (lambda s: {"alpha": -1}, ValueError, r"alpha: must be positive"),
    "alpha nan": (lambda s: {"alpha": float("nan")}, ValueError, r"alpha: must be positive"),
    "alpha string": (
        lambda s: {"alpha": "1"},
        TypeError,
        r"alpha: expected a number or .*relative\(fraction\), got str '1'",
    ),
    "adaptation": (
        lambda s: {"adaptation": "adam"},
        ValueError,
        r"adaptation: 'adam' is none of 'paper', 'exact', 'none'",
    ),
    "hold": (lambda s: {"hold": "plus"}, ValueError, r"hold: 'plus' is none of"),
    "sync": (lambda s: {"sync": "all"}, ValueError, r"sync: 'all' is none of"),
    "group": (lambda s: {"group": object()}, ValueError, r"group: torch.distributed is not initialised; call"),
    "weight": (lambda s: {"weight": -1.0}, ValueError, r"weight: expected a finite number >= 0, or two"),
    "weights": (lambda s: {"weight": (1.0, 2.0, 3.0)}, ValueError, r"weight: expected a finite number >= 0, or two"),
    "bucket_mib": (lambda s: {"bucket_mib": 0}, ValueError, r"bucket_mib: must be positive and finite, got 0"),
    "comm_hook": (lambda s: {"comm_hook": "bf16"}, TypeError, r"comm_hook: expected a function \(group, bucket\)"),
    "backend": (lambda s: {"backend": "gpu"}, ValueError, r"backend: 'gpu' is none of"),
    "cuda": (lambda s: {"backend": "cuda"}, RuntimeError, r"backend: 'cuda' cannot be used: .*\"auto\""),
    "triton": (lambda s: {"backend": "triton"}, RuntimeError, r"backend: 'triton' cannot be used"),
    "DeepSpeed": (
        lambda s: {"optimizer": deepspeed_optimizer()},
        TypeError,
        r"DeepSpeed is not supported.*fully_shard",
    ),
    "sparse embedding": (sparse_embedding, TypeError, r"base_params: tensor 0 gets a sparse gradient.*sparse=False"),
    "sparse meta embedding": (sparse_meta, TypeError, r"meta_params: tensor 0 gets a sparse gradient"),
}


def deepspeed_optimizer() -> Any:
    """Something of DeepSpeed's types, which are no torch optimizers."""
    return type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})()


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str) -> None:
    make, error, message = CASES[case]
    setting = Setting()
    changes = make(setting)
    before = [p.detach().clone() for p in setting.net.parameters()]
    with pytest.raises(error, match=message) as raised:
        setting.run(**changes)
    assert "\n" not in str(raised.value)
    assert all(same_bits(p, q) for p, q in zip(setting.net.parameters(), before, strict=True))
    assert all(p.requires_grad for p in setting.net.parameters())


def test_a_missing_extension_is_an_error_not_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.cpu, "missing", lambda: "it was not built")
    setting = Setting()
    with pytest.raises(RuntimeError, match="backend: 'cpu' cannot be used: it was not built"):
        setting.run(backend="cpu")
    assert not setting.run(backend="auto").degenerate


def test_sama_na_needs_neither_optimizer_nor_grad() -> None:
    setting = Setting()
    setting.optimizer.zero_grad()
    assert setting.run(optimizer=None, adaptation="none").norm > 0
    assert setting.run(optimizer=MyAdam(setting.net.parameters()), adaptation="none").norm > 0


def test_sgd_needs_no_grad() -> None:
    setting = Setting()
    setting.optimizer.zero_grad()
    assert setting.run(optimizer=torch.optim.SGD(setting.net.parameters(), lr=0.1)).norm > 0


def test_two_parameters_in_the_same_memory() -> None:
    """Parts of one flat buffer are no matter, nor is a tied weight; a second parameter on the same numbers is."""
    flat, lam = torch.randn(12), nn.Parameter(torch.zeros(4))
    parts = [nn.Parameter(flat[i : i + 4]) for i in (0, 4, 8)]

    def loss() -> Tensor:
        return sum(((lam * p).square().sum() for p in parts), torch.zeros(()))

    def meta_grad() -> sk.MetaGradient:
        return sk.meta_grad(
            loss, lambda: sum((p.sum() for p in parts), torch.zeros(())), base_params=parts, meta_params=[lam],
            optimizer=None, adaptation="none",
        )  # fmt: skip

    assert not meta_grad().degenerate
    before = flat.clone()
    parts[1].data = flat[2:6]
    with pytest.raises(
        ValueError, match=r"base_params: tensors 0 and 1 \(shape \(4,\)\) are two parameters in the same"
    ):
        meta_grad()
    assert flat.equal(before)
