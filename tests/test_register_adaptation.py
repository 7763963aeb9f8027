"""`register_adaptation` and the choice of an adaptation by exact type: errors, warnings, the example of the docs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import direct_gradient, flat, meta_grad, mixed_derivative, relative_error, same_bits, snapshot, weight_net
from stepping import adapted, differenced, stepped
from torch import Tensor

import sama_kernels as sk
from sama_kernels import adaptation
from sama_kernels.adaptation import registry

DOCS = Path(__file__).parent.parent / "docs" / "optimizers.md"


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What a test registers."""
    registered = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(registered)


class Plain(torch.optim.Optimizer):
    """u = lr g^3, without any state."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad**3)


class Derived(Plain):
    """Of another exact type."""


def plain(grad: Tensor, param: Tensor, state: dict[str, Any], hyper: dict[str, Any]) -> Tensor:
    return hyper["lr"] * grad**3


def example() -> dict[str, Any]:
    """The names that the code of the docs leaves behind."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, str(DOCS), "exec"), names)
    return names


def test_the_example_of_the_docs_runs_as_a_program() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(re.findall(r"\|v\| = \d\S*, gradient of the weights \d", run.stdout)) == 3


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_the_example_of_the_docs_is_right(steps: int) -> None:
    names, options = example(), {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-8}
    torch.manual_seed(steps)
    params, optimizer, before = stepped(names["AdaBelief"], options, steps)
    d = [torch.randn_like(p) for p in params]
    got, _ = adapted(optimizer, params, d, "exact", "reference")
    expected = differenced(names["AdaBelief"], options, before, [p.grad for p in params], d, h=1e-4)
    scale = flat(expected).norm()
    assert (flat(got) - flat(expected)).norm() < 1e-8 * scale + 1e-10


def test_a_registered_optimizer_end_to_end() -> None:
    """The meta gradient against exact double backward along a v from differences of the optimizer's step."""
    optimizer_type, options = example()["AdaBelief"], {"lr": 0.02, "eps": 1e-8}
    problem = weight_net(seed=11, recorded=False)
    optimizer = optimizer_type(problem.theta, **options)
    for _ in range(3):
        before = (snapshot(problem.theta), optimizer.state_dict())
        before = ([p.requires_grad_() for p in before[0]], _copied(before[1]))
        problem.step(optimizer)
    theta = snapshot(problem.theta)
    out = meta_grad(problem, optimizer, alpha=1e-4, adaptation="exact")
    assert all(same_bits(a, b) for a, b in zip(problem.theta, theta, strict=True)) and not out.degenerate
    grads = [p.grad for p in problem.theta]
    v = differenced(optimizer_type, options, before, grads, list(direct_gradient(problem)), h=1e-6)  # g is small
    assert relative_error(out.norm, flat(v).norm()) < 1e-6
    assert relative_error(flat(out.grads), mixed_derivative(problem, tuple(v))) < 1e-6


def _copied(state_dict: dict[str, Any]) -> dict[str, Any]:
    state = {
        i: {k: x.clone() if isinstance(x, Tensor) else x for k, x in s.items()} for i, s in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _calls(optimizer: Any, params: list[Tensor]) -> Any:
    return adaptation.plan(optimizer, params, "paper")


def test_an_optimizer_without_state_or_with_parameters_left_out() -> None:
    sk.register_adaptation(Plain, plain)
    used, unused = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = Plain([used, unused])
    with pytest.raises(ValueError, match="no state for base_params yet"):
        _calls(optimizer, [used, unused])
    used.grad = torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=torch.float64)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 5.0  # after the step
    v: list[Any] = [torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)]
    adaptation.apply(_calls(optimizer, [used, unused]), v, "cpu")
    torch.testing.assert_close(v[0], 0.3 * used.grad**2)
    assert v[1] is None
    used.grad = None
    with pytest.raises(ValueError, match=r"base_params: tensor 0 .*has no \.grad"):
        _calls(optimizer, [used, unused])


def test_the_exact_type_counts() -> None:
    p = torch.randn(2, requires_grad=True)
    for optimizer_type in (Plain, Derived):
        with pytest.raises(TypeError, match=rf"^optimizer: no adaptation for \S*{optimizer_type.__name__}; .*info"):
            _calls(optimizer_type([p]), [p])
    sk.register_adaptation(Plain, plain)
    name = f"{Plain.__module__}.Plain"
    assert name in sk.info()["optimizers"]
    with pytest.raises(
        TypeError, match=r'Derived; .*sama_kernels\.register_adaptation .*docs/optimizers\.md.*adaptation="none"'
    ):
        _calls(Derived([p]), [p])


def test_another_type_of_a_known_name_is_not_taken_for_it() -> None:
    fake = type("AdamW8bit", (Plain,), {"__module__": "torchao.optim.adam"})
    p = torch.randn(2, requires_grad=True)
    with pytest.raises(TypeError, match=r"no adaptation for torchao\.optim\.adam\.AdamW8bit"):
        _calls(fake([p]), [p])


def test_registering_again_needs_overwrite() -> None:
    sk.register_adaptation(Plain, plain)
    for known in (Plain, torch.optim.Adam, torch.optim.Rprop):
        with pytest.raises(ValueError, match=rf"optimizer_type: \S*{known.__name__} has an adaptation.*overwrite=True"):
            sk.register_adaptation(known, plain)
    p = torch.full((3,), 2.0, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=0.5)
    p.grad = torch.full((3,), 2.0)
    optimizer.step()
    assert sk.register_adaptation(torch.optim.SGD, plain, overwrite=True) is plain
    (v,), _ = adapted(optimizer, [p], [torch.ones(3)], "exact", "cpu")
    torch.testing.assert_close(v, torch.full((3,), 3 * 0.5 * 4))
    assert sk.info()["optimizers"].count("torch.optim.SGD") == 1


def test_types_that_are_refused_can_be_registered() -> None:
    sk.register_adaptation(torch.optim.LBFGS, plain)
    p = torch.randn(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([p], lr=0.1)
    optimizer.state[p]["d"] = torch.ones(2)
    p.grad = torch.ones(2)
    assert _calls(optimizer, [p])


def _in_place(grad: Tensor, param: Tensor, state: dict[str, Any], hyper: dict[str, Any]) -> Tensor:
    state["exp_avg"].mul_(0.9)
    return grad


def _mismatched(grad: Tensor, param: Tensor, state: dict[str, Any], hyper: dict[str, Any]) -> Tensor:
    return grad * sk.carried(state["exp_avg"], grad.sum())


BAD_UPDATES: dict[str, tuple[Any, type[Exception], str]] = {
    "None": (lambda g, p, s, h: None, TypeError, r"must return a tensor, .*got NoneType"),
    "shape": (lambda g, p, s, h: g.sum(), ValueError, r"shaped like grad, \(3,\).*got \(\)"),
    "complex": (lambda g, p, s, h: g + 0j, ValueError, r"real; got .*complex"),
    "detached": (lambda g, p, s, h: g.detach(), ValueError, r"no gradient with respect to grad.*detached"),
    "of another": (
        lambda g, p, s, h: torch.ones(3, requires_grad=True) * 2,
        ValueError,
        r"no gradient with respect to grad.*does not use it",
    ),
    "in place": (_in_place, RuntimeError, r"changed state\['exp_avg'\] in place"),
    "param in place": (lambda g, p, s, h: g * p.mul_(2), RuntimeError, r"changed param in place"),
    "carried": (_mismatched, ValueError, r"carried: after has shape \(3,\), but term has shape \(\)"),
}


@pytest.mark.parametrize("case", BAD_UPDATES)
def test_bad_results_of_an_update_function(case: str) -> None:
    update, error, message = BAD_UPDATES[case]
    sk.register_adaptation(torch.optim.Adam, update, overwrite=True)
    p = torch.randn(3, requires_grad=True)
    lam = torch.rand(3, requires_grad=True)
    optimizer = torch.optim.Adam([p])
    (lam * p**2).sum().backward()
    optimizer.step()
    prefix = "" if case == "carried" else r"^update of torch.optim.adam.Adam: "
    with pytest.raises(error, match=prefix + ".*" + message):
        sk.meta_grad(
            lambda: (lam * p**2).sum(), lambda: p.sum(), base_params=[p], meta_params=[lam], optimizer=optimizer
        )
    assert p.requires_grad


def test_a_derivative_that_is_not_finite_is_degenerate() -> None:
    sk.register_adaptation(Plain, lambda g, p, s, h: g.abs().sqrt())
    p, lam = torch.tensor([1.0, 0.0], requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = Plain([p])
    p.grad = torch.tensor([1.0, 0.0])
    optimizer.step()
    before = p.detach().clone()
    arguments: dict[str, Any] = {"base_params": [p], "meta_params": [lam], "optimizer": optimizer}
    out = sk.meta_grad(lambda: (lam * p**2).sum(), lambda: p.sum(), adaptation="exact", **arguments)
    assert out.degenerate and (out.grads[0] == 0).all() and same_bits(p, before)
    out = sk.meta_grad(lambda: (lam * p**2).sum(), lambda: p.sum(), **arguments)  # "paper": the cell was not seen
    assert not out.degenerate and out.norm == 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.nn.Linear, plain), TypeError, r"optimizer_type: expected a subclass of torch.optim.Optimizer"),
        ((torch.optim.SGD([torch.ones(1)]), plain), TypeError, r"optimizer_type: expected a subclass"),
        ((Plain, 3), TypeError, r"update: expected a function \(grad, param, state, hyper\) -> u, got 3"),
        ((Plain, lambda grad: grad), TypeError, r"update: it must take four arguments"),
    ],
)
def test_bad_registrations(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sk.register_adaptation(*arguments)
    assert Plain not in registry._registered


@pytest.mark.parametrize(
    ("optimizer_type", "message"),
    [
        (torch.optim.SparseAdam, r"SparseAdam: its gradient is sparse, but v and theta\+- are dense.*sparse=False"),
        (torch.optim.LBFGS, r"LBFGS: one of its steps makes several evaluations.*adaptation=\"none\""),
    ],
)
def test_types_that_have_no_adaptation_say_why(optimizer_type: Any, message: str) -> None:
    p = torch.randn(2, requires_grad=True)
    with pytest.raises(TypeError, match=r"^optimizer: there is no adaptation for \S+" + message):
        _calls(optimizer_type([p]), [p])


def test_no_package_is_imported_for_its_optimizers() -> None:
    code = (
        "import sys, sama_kernels; sama_kernels.info();"
        "print([m for m in ('transformers', 'torchao', 'bitsandbytes', 'lion_pytorch', 'timm') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_table_of_the_docs_names_every_optimizer() -> None:
    text = DOCS.read_text().replace("-", "_")
    for name in sk.info()["optimizers"]:
        package, short = name.partition(".")[0], name.rpartition(".")[2]
        assert re.search(rf"[`.]{short}`", text) and package in text, name
