"""Every algorithm that adapts to the optimizer, with every optimizer: against D by differences of its own real step.

H and the mixed derivative are written out by autograd, D x is a fourth-order difference of the optimizer's step in
float64 (`stepping.differenced`), so nothing of the library is on the expected side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Bilevel, flat, relative_error, weight_net
from stepping import adapted, differenced
from torch import Tensor

import sama_kernels as sk
from sama_kernels.adaptation import registry
from sama_kernels.algorithms import T1T2, Algorithm, ConjugateGradient, Neumann, Nystrom, Truncated

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
    "Adam": {"lr": 0.02, "weight_decay": 0.1},
    "AdamW": {"lr": 0.02, "amsgrad": True},
    "NAdam": {"lr": 0.02},
    "RAdam": {"lr": 0.02},
    "Adamax": {"lr": 0.02},
    "Adagrad": {"lr": 0.1},
    "Adadelta": {"lr": 1.0, "eps": 1e-3},
    "RMSprop": {"lr": 0.02, "momentum": 0.5, "centered": True, "eps": 1e-2},
    "ASGD": {"lr": 0.1, "lambd": 0.1},
    "Adafactor": {"lr": 0.3, "eps": (1e-2, 1e-3)},
    "Muon": {"lr": 0.1},
}
SIGNS = {"Rprop": {"lr": 0.1}}  # D = 0
Apply = Callable[[Tensor], Tensor]


def neumann(h: Tensor, d: Tensor, adapt: Apply) -> Tensor:
    step = torch.eye(len(d), dtype=d.dtype) - 0.5 * h
    return adapt(0.5 * (d + step @ d + step @ step @ d))


def truncated(h: Tensor, d: Tensor, adapt: Apply) -> Tensor:
    once = d - h @ adapt(d)
    return adapt(d + once + once - h @ adapt(once))


def solved(damping: float) -> Callable[[Tensor, Tensor, Apply], Tensor]:
    return lambda h, d, adapt: adapt(torch.linalg.solve(h + damping * torch.eye(len(d), dtype=d.dtype), d))


ALGORITHMS: list[tuple[Algorithm | str, Callable[[Tensor, Tensor, Apply], Tensor]]] = [
    ("sama", lambda h, d, adapt: adapt(d)),
    (T1T2(adapt=True), lambda h, d, adapt: adapt(d)),
    (Neumann(adapt=True, terms=2, step_size=0.5), neumann),
    (ConjugateGradient(adapt=True, iterations=70, damping=1.0), solved(1.0)),
    (Nystrom(adapt=True, rank=70, damping=1.0), solved(1.0)),
    (Truncated(steps=3), truncated),
]


def steps_made(name: str, options: dict[str, Any]) -> tuple[Bilevel, list[Tensor], torch.optim.Optimizer, Any]:
    """After three steps of the matrices alone (Muon takes nothing else); what was before the last one."""
    problem = weight_net(3)
    theta = [p for p in problem.theta if p.ndim == 2]
    optimizer = getattr(torch.optim, name)(theta, **options)
    for _ in range(3):
        before = copy.deepcopy((theta, optimizer.state_dict()))
        problem.step(optimizer)
        grads = [p.grad for p in theta]
    return problem, theta, optimizer, (before, grads)


def expected_parts(problem: Bilevel, theta: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """H, the mixed derivative, d."""
    g = torch.autograd.grad(problem.base_loss(), theta, create_graph=True)
    rows = [
        torch.autograd.grad(x, (*theta, *problem.lam), retain_graph=True) for x in torch.cat([y.flatten() for y in g])
    ]
    h, mixed = (torch.stack([flat(r[part]) for r in rows]) for part in (slice(0, 2), slice(2, None)))
    return h, mixed.T, flat(torch.autograd.grad(problem.meta_loss(), theta))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_algorithm_with_every_optimizer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "Muon":  # its iteration in the dtype of the gradient instead of bfloat16
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    problem, theta, optimizer, (before, grads) = steps_made(name, OPTIMIZERS[name])
    h, mixed, d = expected_parts(problem, theta)

    def adapt(x: Tensor) -> Tensor:
        parts = [part.view(p.shape) for part, p in zip(x.split([p.numel() for p in theta]), theta, strict=True)]
        step = 1e-4 if name == "Muon" else 1e-5
        return flat(differenced(getattr(torch.optim, name), OPTIMIZERS[name], before, grads, parts, step))

    for algorithm, formula in ALGORITHMS:
        options: dict[str, Any] = {"difference": "exact"} if algorithm == "sama" else {}
        out = sk.meta_grad(
            problem.base_loss, problem.meta_loss, base_params=theta, meta_params=problem.weigher, optimizer=optimizer,
            adaptation="exact", algorithm=algorithm, **options,
        )  # fmt: skip
        assert not out.degenerate
        assert relative_error(flat(out.grads), -mixed @ formula(h, d, adapt)) < 1e-6, algorithm


@pytest.mark.parametrize("name", SIGNS)
def test_where_the_derivative_of_the_step_is_zero(name: str) -> None:
    problem, theta, optimizer, _ = steps_made(name, SIGNS[name])
    for algorithm, _ in ALGORITHMS:
        out = sk.meta_grad(
            problem.base_loss, problem.meta_loss, base_params=theta, meta_params=problem.weigher, optimizer=optimizer,
            adaptation="exact", algorithm=algorithm,
        )  # fmt: skip
        assert out.degenerate and (flat(out.grads) == 0).all(), algorithm


def test_none_is_left_out() -> None:
    here = {getattr(torch.optim, name) for name in (*OPTIMIZERS, *SIGNS)}
    claimed = {name for name in registry.supported() if name.startswith("torch.optim.")}
    assert {f"torch.optim.{t.__name__}" for t in here} == claimed


EXTERNAL: list[tuple[str, str, dict[str, Any]]] = [
    ("transformers", "Adafactor", {"lr": 0.05, "relative_step": False, "scale_parameter": False}),
    ("torchao.optim", "AdamW8bit", {"lr": 0.02}),
    ("torchao.optim", "Adam4bit", {"lr": 0.02}),
    ("bitsandbytes.optim", "AdamW32bit", {"lr": 0.02}),
    ("bitsandbytes.optim", "AdamW8bit", {"lr": 0.02}),
]


@pytest.mark.parametrize(("module", "name", "options"), EXTERNAL, ids=[name for _, name, _ in EXTERNAL])
def test_optimizers_of_other_packages(
    module: str, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """D by the library's own op, which tests/test_adaptation_low_bit.py and _general.py hold against real steps."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # torchao's step: 15 s of a C++ compiler
    problem = weight_net(3, dtype=torch.float32)
    theta = [p for p in problem.theta if p.ndim == 2]
    optimizer = getattr(pytest.importorskip(module), name)(theta, **options)
    for _ in range(3):
        problem.step(optimizer)
    h, mixed, d = expected_parts(problem, theta)

    def adapt(x: Tensor) -> Tensor:
        parts = [part.view(p.shape) for part, p in zip(x.split([p.numel() for p in theta]), theta, strict=True)]
        return flat(adapted(optimizer, theta, parts, "exact", "reference")[0])

    for algorithm, formula in ALGORITHMS[1:]:
        out = sk.meta_grad(
            problem.base_loss, problem.meta_loss, base_params=theta, meta_params=problem.weigher, optimizer=optimizer,
            adaptation="exact", algorithm=algorithm,
        )  # fmt: skip
        assert relative_error(flat(out.grads), -mixed @ formula(h, d, adapt)) < 1e-3, algorithm
