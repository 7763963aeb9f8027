"""torch.set_default_device must not matter: nothing that a meta step makes for itself lies where the user's tensors go.

With "meta" as the default, whatever is made without saying where has no contents, and the step fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems import OPTIMIZERS, after_steps, flat, meta_grad, weight_net
from ranks import run_ranks
from torch import Tensor

import sama_kernels as sk
from sama_kernels import algorithms, mask_draws

OPTIONS: list[dict[str, Any]] = [
    {},
    {"hold": "center"},
    {"difference": "forward"},
    {"difference": "exact"},
    {"adaptation": "exact", "update_base": True},
    {"adaptation": "none"},
    {"alpha": sk.relative(1e-3)},
    {"backend": "reference"},
    {"clip_coef": 0.5},
    {"clip_value": 0.1},
    *({"algorithm": name} for name in ("t1_t2", "neumann", "conjugate_gradient", "nystrom", "truncated", "iterative")),
    {"algorithm": algorithms.Iterative(steps=2, advance=True)},
]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    mask_draws.agrees.cache_clear()
    yield
    mask_draws.agrees.cache_clear()


def _gradient(case: int, options: dict[str, Any], default: str) -> Tensor:
    problem = weight_net(3)
    optimizer = after_steps(problem, case)
    with torch.device(default):
        return flat(meta_grad(problem, optimizer, **options).grads)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", [0, 4])
def test_results_do_not_depend_on_it(case: int, options: dict[str, Any]) -> None:
    assert torch.equal(_gradient(case, options, "meta"), _gradient(case, options, "cpu"))


@pytest.mark.parametrize("case", range(len(OPTIMIZERS)))
def test_nor_with_other_optimizers(case: int) -> None:
    assert torch.equal(_gradient(case, {}, "meta"), _gradient(case, {}, "cpu"))


def _matrices(optimizer_type: Any, options: dict[str, Any], default: str) -> Tensor:
    problem = weight_net(4, torch.float32)
    matrices = [p for p in problem.theta if p.dim() == 2]
    optimizer = optimizer_type(matrices, **options)
    for _ in range(3):
        problem.step(optimizer)
    with torch.device(default):
        out = sk.meta_grad(
            problem.base_loss, problem.meta_loss, base_params=matrices, meta_params=problem.weigher,
            optimizer=optimizer, alpha=0.01,
        )  # fmt: skip
    return flat(out.grads)


def test_nor_where_the_update_is_differentiated() -> None:
    for optimizer_type, options in ((torch.optim.Adafactor, {"lr": 0.1}), (torch.optim.Muon, {"lr": 0.1})):
        assert torch.equal(*(_matrices(optimizer_type, options, default) for default in ("meta", "cpu")))


@pytest.mark.parametrize(("package", "options"), [
    ("transformers.Adafactor", {"lr": None}),
    ("transformers.Adafactor", {"lr": 0.01, "relative_step": False, "scale_parameter": True}),
    ("bitsandbytes.optim.AdamW8bit", {"min_8bit_size": 1}),
])  # fmt: skip
def test_nor_with_those_of_other_packages(package: str, options: dict[str, Any]) -> None:
    module, _, name = package.rpartition(".")
    optimizer_type = getattr(pytest.importorskip(module), name)
    assert torch.equal(*(_matrices(optimizer_type, options, default) for default in ("meta", "cpu")))


def test_nor_do_diagnosis_and_clipping() -> None:
    problem = weight_net(5)
    optimizer = after_steps(problem, 2)
    with torch.device("meta"):
        coef = sk.clip_coef(torch.nn.utils.get_total_norm([p.grad for p in problem.theta if p.grad is not None]), 1.0)
        assert coef.device.type == "cpu" and sk.clip_coef(2.0, 1.0).device.type == "cpu"
        found = sk.diagnose(
            problem.base_loss, problem.meta_loss, base_params=problem.net, meta_params=problem.weigher,
            optimizer=optimizer, alpha=1e-3,
        )  # fmt: skip
        assert "alpha" in str(found)


def _together(rank: int, world: int, default: str) -> Tensor:
    return _gradient(2, {"sync": "full", "group": dist.group.WORLD, "weight": (2.0, 3.0)}, default)


def test_nor_do_several_processes() -> None:
    assert torch.equal(*(run_ranks(1, _together, default)[0] for default in ("meta", "cpu")))
