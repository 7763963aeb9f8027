"""The contract of the entry points: results, accumulation, ways to pass parameters, signatures."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from typing import Any

import torch
from problems import after_steps, flat, meta_grad, relative_error, weight_net
from torch import Tensor

import sama_kernels as sk

FORKS = """
from unittest.mock import patch
import torch
def started(*_, **__):
    raise AssertionError("this starts CUDA, after which the process must not fork")
def watched():
    return patch.multiple(torch.cuda, is_available=started, device_count=started, _lazy_init=started)
with watched():
    import sama_kernels
    from problems import after_steps, meta_grad, weight_net
problem = weight_net(seed=1)
optimizer = after_steps(problem, 2)  # Adam's own step asks in torch 2.11 and 2.14
with watched():
    meta_grad(problem, optimizer)
"""


def test_cuda_is_not_started_for_a_model_on_the_cpu() -> None:
    """Neither by importing the package nor by a meta step: loaders of data may fork afterwards."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", FORKS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_losses_and_result_fields() -> None:
    problem = weight_net(seed=1)
    optimizer = after_steps(problem, 2)
    out = meta_grad(problem, optimizer, alpha=0.1)
    assert [f for f in out.__dataclass_fields__] == [
        "grads",
        "meta_loss",
        "base_loss_plus",
        "base_loss_minus",
        "norm",
        "epsilon",
        "degenerate",
        "realised",
        "alignment",
    ]
    assert isinstance(out.grads, tuple) and [g.shape for g in out.grads] == [p.shape for p in problem.lam]
    torch.testing.assert_close(out.meta_loss, problem.meta_loss().detach())
    assert out.realised is None and out.alignment is None  # of interest for 16-bit parameters only
    for name in list(out.__dataclass_fields__)[1:-2]:
        value = getattr(out, name)
        assert value.shape == () and not value.requires_grad
    assert out.base_loss_plus != out.base_loss_minus
    assert all(p.grad is None for p in problem.lam)


def test_unread_meta_parameters_get_zeros() -> None:
    problem = weight_net(seed=3)
    optimizer = after_steps(problem, 0)
    extra, explicit_only = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    original = problem.meta_loss
    problem.meta_loss = lambda: original() + (2 * explicit_only).sum()
    out = sk.meta_grad(
        problem.base_loss,
        problem.meta_loss,
        base_params=problem.net,
        meta_params=[*problem.lam, extra, explicit_only],
        optimizer=optimizer,
    )
    assert torch.equal(out.grads[-2], torch.zeros(3)) and torch.equal(out.grads[-1], torch.full((2,), 2.0))


def test_microbatches_are_summed() -> None:
    problem = weight_net(seed=4)
    x, y = torch.randn(10, 5, dtype=torch.float64), torch.randn(10, 1, dtype=torch.float64)

    def part(rows: slice) -> Any:
        @sk.recorded
        def loss() -> Tensor:
            losses = (problem.net(x[rows]) - y[rows]).square()
            return (problem.weigher(sk.stop_gradient(losses)) * losses).sum()

        return loss

    parts, whole = [part(slice(0, 3)), part(slice(3, 10))], part(slice(0, 10))
    problem.base_loss = whole
    optimizer = after_steps(problem, 2)
    for p in parts:
        p()
    whole()
    one = meta_grad(problem, optimizer)
    problem.base_loss = parts  # type: ignore[assignment]
    many = meta_grad(problem, optimizer)
    assert relative_error(flat(many.grads), flat(one.grads)) < 1e-9
    torch.testing.assert_close(many.base_loss_plus, one.base_loss_plus)
    centred = meta_grad(problem, optimizer, hold="center")
    assert relative_error(flat(centred.grads), flat(one.grads)) < 1e-9


def test_meta_backward_accumulates_like_backward() -> None:
    problem = weight_net(seed=5)
    optimizer = after_steps(problem, 2)
    arguments: dict[str, Any] = {
        "base_params": problem.net,
        "meta_params": problem.weigher,
        "optimizer": optimizer,
        "alpha": 1e-2,
    }
    expected = sk.meta_grad(problem.base_loss, problem.meta_loss, **arguments).grads
    for times in (1, 2):
        out = sk.meta_backward(problem.base_loss, problem.meta_loss, **arguments)
        for p, g, own in zip(problem.lam, expected, out.grads, strict=True):
            torch.testing.assert_close(p.grad, times * g)
            assert torch.equal(own, g)  # accumulating does not reach into the result


def test_sama_loss_is_differentiable_in_lambda_and_beyond() -> None:
    problem = weight_net(seed=6)
    optimizer = after_steps(problem, 2)
    expected = meta_grad(problem, optimizer).grads
    loss = sk.sama_loss(
        problem.base_loss,
        problem.meta_loss,
        base_params=problem.net,
        meta_params=problem.weigher,
        optimizer=optimizer,
        alpha=1e-3,
    )
    torch.testing.assert_close(loss.detach(), problem.meta_loss().detach())
    (3 * loss + problem.lam[0].square().sum()).backward()
    torch.testing.assert_close(problem.lam[0].grad, 3 * expected[0] + 2 * problem.lam[0].detach())
    torch.testing.assert_close(problem.lam[1].grad, 3 * expected[1])
    assert issubclass(sk.SamaFunction, torch.autograd.Function)

    torch.manual_seed(0)  # lambda computed from phi: the gradient goes on through the graph that made lambda
    phi = torch.randn(24, dtype=torch.float64, requires_grad=True)
    weights = phi.sigmoid()
    x, y = torch.randn(24, 5, dtype=torch.float64), torch.randn(24, 1, dtype=torch.float64)
    arguments: dict[str, Any] = {"base_params": problem.net, "meta_params": [weights], "optimizer": optimizer}
    base = lambda: (weights[:, None] * (problem.net(x) - y).square()).mean()  # noqa: E731
    sk.sama_loss(base, problem.meta_loss, **arguments).backward()
    grads = sk.meta_grad(base, problem.meta_loss, **arguments).grads
    torch.testing.assert_close(phi.grad, grads[0] * (weights * (1 - weights)).detach())


def test_iterables_generators_and_frozen_layers() -> None:
    problem = weight_net(seed=11)
    optimizer = after_steps(problem, 2)
    by_module = meta_grad(problem, optimizer)
    by_generator = sk.meta_grad(
        problem.base_loss,
        problem.meta_loss,
        base_params=problem.net.parameters(),
        meta_params=iter(problem.lam),
        optimizer=optimizer,
        alpha=1e-3,
    )
    assert torch.equal(flat(by_module.grads), flat(by_generator.grads))
    first = problem.net[0]  # type: ignore[index]
    for p in first.parameters():
        p.requires_grad_(False)
    partial = meta_grad(problem, optimizer)
    assert not any(p.requires_grad for p in first.parameters())
    assert not torch.equal(flat(partial.grads), flat(by_module.grads))


def test_works_under_no_grad_and_inside_a_thread() -> None:
    import threading

    problem = weight_net(seed=12)
    optimizer = after_steps(problem, 2)
    results = [meta_grad(problem, optimizer)]
    with torch.no_grad():
        results.append(meta_grad(problem, optimizer))
    thread = threading.Thread(target=lambda: results.append(meta_grad(problem, optimizer)))
    thread.start()
    thread.join()
    assert all(torch.equal(flat(r.grads), flat(results[0].grads)) for r in results) and len(results) == 3


def test_signature_is_the_documented_one() -> None:
    expected = ["base_loss", "meta_loss", "base_params", "meta_params", "optimizer"]
    expected += ["alpha", "adaptation", "update_base", "sync", "group", "backend", "hold", "rounding", "seed"]
    expected += ["difference", "clip_coef", "clip_rank_one", "clip_value", "grad_scaler", "master_params"]
    expected += ["weight", "bucket_mib", "comm_hook", "algorithm"]
    defaults = {
        "alpha": 1.0,
        "adaptation": "paper",
        "update_base": False,
        "sync": "final",
        "group": None,
        "backend": "auto",
        "hold": "auto",
        "rounding": "nearest",
        "seed": None,
        "difference": "central",
        "clip_coef": None,
        "clip_rank_one": False,
        "clip_value": None,
        "grad_scaler": None,
        "master_params": None,
        "weight": None,
        "bucket_mib": 25.0,
        "comm_hook": None,
        "algorithm": "sama",
    }
    for function in (sk.meta_grad, sk.meta_backward, sk.sama_loss, sk.diagnose):
        parameters = inspect.signature(function).parameters
        assert list(parameters) == expected
        assert {k: parameters[k].default for k in defaults} == defaults


def test_info_names_a_backend_and_a_reason_for_every_op() -> None:
    facts = sk.info()
    assert facts["version"] == sk.__version__ and facts["build"]["cpu"] is True
    for choices in facts["ops"].values():
        assert choices["cpu"]["backend"] == "cpu" and choices["cpu"]["why"]


def test_meta_parameters_that_one_operator_makes() -> None:
    """Two outputs of a hypernetwork are not computed from one another; their gradients meet in its parameters."""
    problem = weight_net(seed=6)
    optimizer = after_steps(problem, 2)
    code = torch.randn(48, dtype=torch.float64, requires_grad=True)
    residuals = torch.randn(24, 1, dtype=torch.float64)

    def losses(first: Tensor, second: Tensor) -> Any:
        def base_loss() -> Tensor:
            fit = sum((p.sin().sum() for p in problem.net.parameters()), torch.zeros(()))
            return ((first * second).sigmoid()[:, None] * (residuals + fit).square()).mean()

        return base_loss

    parts = code.exp().chunk(2)
    given = {"base_params": problem.net, "optimizer": optimizer, "alpha": 1e-3}
    out = sk.meta_backward(losses(*parts), problem.meta_loss, meta_params=parts, **given)
    (expected,) = torch.autograd.grad(code.exp(), code, torch.cat(out.grads))
    torch.testing.assert_close(code.grad, expected, rtol=1e-12, atol=0)
