"""Held values: right where a plain detach is wrong, from a tape or from the centre, and loud when they do not match."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from problems import Bilevel, direct_gradient, flat, meta_grad, mixed_derivative, relative_error, weight_net
from torch import Tensor, nn

import sama_kernels as sk


def grads(problem: Bilevel, **options: Any) -> Tensor:
    """SAMA-NA at a small alpha: v = d, so the exact answer is the mixed derivative along d."""
    out = meta_grad(problem, None, **{"adaptation": "none", "alpha": 1e-4, **options})
    return flat(out.grads)


@pytest.mark.parametrize("seed", range(3))
def test_a_plain_detach_is_far_off_and_stop_gradient_is_not(seed: int) -> None:
    """0.54, 0.98, 0.31 for a plain detach, below 1e-8 held: so that nobody undoes stop_gradient."""
    held, plain = weight_net(seed), weight_net(seed, hold="detach")
    held.base_loss()
    exact = mixed_derivative(held, direct_gradient(held))
    assert relative_error(grads(held), exact) < 1e-7
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert relative_error(grads(plain), exact) > 0.3


def test_ordinary_calls_detach() -> None:
    x = torch.randn(3, requires_grad=True)
    y = sk.stop_gradient(x * 2)
    assert not y.requires_grad and torch.equal(y, 2 * x)


def test_tape_of_the_base_step_saves_the_forward_at_the_centre() -> None:
    for recorded, expected in ((True, 2), (False, 3)):
        problem = weight_net(0, recorded=False)
        inner, calls = problem.base_loss, []

        def counting(inner: Any = inner, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return inner()

        problem.base_loss = sk.recorded(counting) if recorded else counting
        problem.base_loss()
        grads(problem)  # the first meta step may learn that values at theta are needed
        del calls[:]
        grads(problem)
        assert len(calls) == expected
        del calls[:]
        grads(problem, hold="center")
        assert len(calls) == 3


def test_no_centre_evaluation_where_nothing_is_held() -> None:
    net = nn.Linear(3, 1).double()
    weights = torch.rand(8, dtype=torch.float64, requires_grad=True)
    x, calls = torch.randn(8, 3, dtype=torch.float64), []

    def base() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return (weights * net(x).squeeze(1).square()).mean()

    for hold in ("auto", "center"):
        del calls[:]
        sk.meta_grad(
            base,
            lambda: net(x).mean(),
            base_params=net,
            meta_params=[weights],
            optimizer=None,
            adaptation="none",
            hold=hold,
        )
        assert calls == [True, True]


def test_auto_holds_the_values_of_the_last_ordinary_call() -> None:
    """The base step's g saw the values before the step; "auto" holds those, "center" those after it."""
    problem = weight_net(1)
    optimizer = torch.optim.SGD(problem.theta, lr=0.5)
    problem.base_loss()
    problem.step(optimizer)
    auto, centre = grads(problem), grads(problem, hold="center")
    problem.base_loss()
    assert relative_error(grads(problem), centre) < 1e-6
    assert relative_error(auto, centre) > 1e-3


def test_held_values_and_dropout_masks_come_from_the_same_call() -> None:
    """With a tape, the perturbed passes replay the random numbers of the recorded call: then the meta gradient is the
    exact mixed derivative of the very loss that the base step differentiated."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 1)).double()
    weigher = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid()).double()
    x, y = torch.randn(32, 5, dtype=torch.float64), torch.randn(32, 1, dtype=torch.float64)

    @sk.recorded
    def base() -> Tensor:
        losses = (net(x) - y).square()
        return (weigher(sk.stop_gradient(losses)) * losses).mean()

    def meta() -> Tensor:
        net.eval()
        loss = (net(x) - 1).square().mean()
        net.train()
        return loss

    loss = base()
    torch.randn(100)  # the generator moves on between the base step and the meta step
    problem = Bilevel(net, weigher, lambda: loss, meta)
    exact = mixed_derivative(problem, direct_gradient(problem))
    problem.base_loss = base
    assert relative_error(grads(problem), exact) < 1e-6


def test_a_tape_that_was_changed_in_place_is_not_used() -> None:
    problem = weight_net(2, recorded=False)
    net, weigher = problem.net, problem.weigher
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)

    seen: list[Tensor] = []

    def base() -> Tensor:
        losses = (net(x) - y).square()
        seen.append(losses)
        return (weigher(sk.stop_gradient(losses)) * losses).mean()

    problem.base_loss = base
    expected = grads(problem)
    problem.base_loss = sk.recorded(base)
    problem.base_loss()
    seen[-1].detach().mul_(0)
    assert relative_error(grads(problem), expected) < 1e-9


def test_mismatched_calls_are_errors() -> None:
    problem = weight_net(3, recorded=False)
    net, weigher = problem.net, problem.weigher
    x = torch.randn(8, 5, dtype=torch.float64)
    rows, times = [8], [1]

    @sk.recorded
    def base() -> Tensor:
        losses = net(x[: rows[0]]).square()
        w = losses.new_ones(())
        for _ in range(times[0]):
            w = w * weigher(sk.stop_gradient(losses))
        return (w * losses).mean() + 0 * sum(p.sum() for p in weigher.parameters())

    problem.base_loss = base
    base()
    before = flat(problem.theta)
    for change, value, message in ((rows, 4, "same batch"), (times, 2, "more often"), (times, 0, "called 0 times")):
        old, change[0] = change[0], value
        with pytest.raises(RuntimeError, match=message):
            grads(problem)
        change[0] = old
        assert torch.equal(flat(problem.theta), before)
    grads(problem)


def test_changing_a_held_value_in_place_is_an_error() -> None:
    problem = weight_net(4, recorded=False)
    net, weigher = problem.net, problem.weigher
    x = torch.randn(8, 5, dtype=torch.float64)

    def base() -> Tensor:
        losses = net(x).square()
        held = sk.stop_gradient(losses)
        if not torch.is_grad_enabled():
            return losses.mean()
        held.sub_(held.mean())
        return (weigher(held) * losses).mean()

    problem.base_loss = base
    with pytest.raises(RuntimeError, match=r"changed in place.*clone"):
        grads(problem)


DETACHES = {
    "detach": lambda losses: losses.detach(),
    "data": lambda losses: losses.data,
    "no_grad": lambda losses: _under_no_grad(losses),
}


def _under_no_grad(losses: Tensor) -> Tensor:
    with torch.no_grad():
        return losses * 1.0


def closure_with(detached: Any, net: nn.Module, weigher: nn.Module, x: Tensor) -> Any:
    """A code object of its own for every test, as the warning comes once per piece of code."""
    scope: dict[str, Any] = {"detached": detached, "net": net, "weigher": weigher, "x": x}
    exec("def base():\n losses = net(x).square()\n return (weigher(detached(losses)) * losses).mean()", scope)
    return scope["base"]


@pytest.mark.parametrize("kind", DETACHES)
def test_a_plain_detach_is_noticed_once(kind: str) -> None:
    problem = weight_net(5)
    x = torch.randn(8, 5, dtype=torch.float64)
    problem.base_loss = closure_with(DETACHES[kind], problem.net, problem.weigher, x)
    with pytest.warns(UserWarning, match="stop_gradient"):
        grads(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # ours; torch deprecates parts of its own
        grads(problem)


def test_harmless_detaches_are_not_warned_about() -> None:
    problem = weight_net(6, recorded=False)
    net, weigher = problem.net, problem.weigher
    x, y, logged = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64), []

    def base() -> Tensor:
        prediction = net(x)
        losses = (prediction - y).square()
        logged.append(losses.detach().mean())  # only looked at
        with torch.no_grad():
            logged.append((prediction > 0).double().mean())
        return (weigher(sk.stop_gradient(losses)) * losses).mean() + 0 * weigher(y.detach()).mean()

    problem.base_loss = base
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # ours; torch deprecates parts of its own
        grads(problem)


def test_recorded_closures_own_their_tapes() -> None:
    one, two = weight_net(7), weight_net(8)
    expected = [grads(p, hold="center") for p in (one, two)]
    one.base_loss()
    two.base_loss()  # must not replace the tape of the first
    for p, e in zip((one, two), expected, strict=True):
        assert relative_error(grads(p), e) < 1e-6


def test_recorded_keeps_name_and_result() -> None:
    @sk.recorded
    def base_loss() -> Tensor:
        """Doc."""
        return torch.ones(())

    assert base_loss.__name__ == "base_loss" and base_loss.__doc__ == "Doc." and base_loss() == 1


@pytest.mark.parametrize("difference", ["central", "forward", "exact"])
@pytest.mark.parametrize("hold", ["auto", "center"])
def test_stop_gradient_is_not_taken_for_a_plain_detach(hold: str, difference: str) -> None:
    weigher = nn.Linear(1, 1).double()
    namespace: dict[str, Any] = {"sk": sk, "net": nn.Linear(5, 1).double(), "weigher": weigher, "torch": torch}
    code = (
        "def base():\n x = net(torch.ones(3, 5).double()).square()\n return (weigher(sk.stop_gradient(x)) * x).mean()"
    )
    exec(code, namespace)  # a code object of its own: each is watched once
    net = namespace["net"]
    problem = Bilevel(net, weigher, namespace["base"], lambda: net(torch.ones(1, 5).double()).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # ours; torch deprecates parts of its own
        grads(problem, hold=hold, difference=difference)


def test_the_forward_of_an_autograd_function_is_not_taken_for_a_plain_detach() -> None:
    """It runs without grad, but its result has one."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * grad

    theta, lam = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # ours; torch deprecates parts of its own
        sk.meta_grad(
            lambda: (lam * Square.apply(theta)).sum(), lambda: theta.sum(), base_params=[theta], meta_params=[lam],
            optimizer=None, adaptation="none",
        )  # fmt: skip


@pytest.mark.parametrize("difference", ["central", "forward", "exact"])
def test_held_values_of_a_loss_with_gradients_of_its_inputs(difference: str) -> None:
    """Without a recording they come from one more evaluation, in which a gradient penalty has to work too."""
    torch.manual_seed(12)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    weigher = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1), nn.Sigmoid()).double()
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 1, dtype=torch.float64)

    def base_loss() -> Tensor:
        inputs = x.clone().requires_grad_()
        outputs = net(inputs)
        (slopes,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
        losses = (outputs - y).square() + slopes.square().sum(1, keepdim=True)
        return (weigher(sk.stop_gradient(losses)) * losses).mean()

    found = []
    for loss in (base_loss, sk.recorded(base_loss)):
        loss()
        out = sk.meta_grad(
            loss, lambda: (net(x) - 1).square().mean(), base_params=net, meta_params=weigher, optimizer=None,
            adaptation="none", difference=difference, alpha=1e-3,
        )  # fmt: skip
        found.append(flat(out.grads))
    assert found[0].norm() > 0 and relative_error(found[0], found[1]) < 1e-12


def test_a_graph_that_saved_theta_can_be_used_after_an_error_at_the_centre() -> None:
    problem = weight_net(15, recorded=False)
    failing = []

    def base_loss() -> Tensor:
        loss = problem.base_loss()
        if failing:
            raise KeyError("on purpose")
        return loss

    before = problem.meta_loss()
    versions = [p._version for p in problem.theta]
    failing.append(True)
    with pytest.raises(KeyError):
        sk.meta_grad(
            base_loss, problem.meta_loss, base_params=problem.net, meta_params=problem.weigher, optimizer=None,
            adaptation="none",
        )  # fmt: skip
    assert [p._version for p in problem.theta] == versions
    before.backward()
