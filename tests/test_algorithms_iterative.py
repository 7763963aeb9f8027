"""Reverse mode through real optimizer steps, against differences of the meta loss after really making them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from problems import Bilevel, flat, meta_grad, relative_error, same_bits, snapshot, weight_net
from torch import Tensor, nn

import sama_kernels as sk
from sama_kernels.algorithms import Iterative, adam_step

OPTIMIZERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"lr": 0.02}),
    (torch.optim.NAdam, {"lr": 0.02}),
    (torch.optim.RAdam, {"lr": 0.02}),
    (torch.optim.Adagrad, {"lr": 0.1}),
    (torch.optim.Adadelta, {"lr": 1.0, "eps": 1e-3}),
    (torch.optim.RMSprop, {"lr": 0.02, "momentum": 0.5, "centered": True, "eps": 1e-2}),
    (torch.optim.Adamax, {"lr": 0.02}),
    (torch.optim.ASGD, {"lr": 0.1}),
]


def trained(case: int) -> tuple[Bilevel, torch.optim.Optimizer]:
    problem = weight_net(case, recorded=False)
    optimizer_type, options = OPTIMIZERS[case]
    optimizer = optimizer_type(problem.theta, **options)
    for _ in range(3):
        problem.step(optimizer)
    return problem, optimizer


def after_steps(problem: Bilevel, optimizer: torch.optim.Optimizer, steps: int, lam: Tensor) -> float:
    """The meta loss after really making `steps` steps with this lambda; everything is put back."""
    theta, state, old = snapshot(problem.theta), copy.deepcopy(optimizer.state_dict()), snapshot(problem.lam)
    with torch.no_grad():
        for p, part in zip(problem.lam, torch.split(lam, [p.numel() for p in problem.lam]), strict=True):
            p.copy_(part.view(p.shape))
    grads = [p.grad for p in (*problem.theta, *problem.lam)]
    for _ in range(steps):
        for p in problem.theta:
            p.grad = None
        problem.base_loss().backward()
        optimizer.step()
    loss = float(problem.meta_loss().detach())
    with torch.no_grad():
        for p, value in zip((*problem.theta, *problem.lam), (*theta, *old), strict=True):
            p.copy_(value)
    optimizer.load_state_dict(state)
    for p, grad in zip((*problem.theta, *problem.lam), grads, strict=True):
        p.grad = grad
    return loss


@pytest.mark.parametrize("case", range(len(OPTIMIZERS)), ids=[t.__name__ for t, _ in OPTIMIZERS])
@pytest.mark.parametrize("steps", [1, 3])
def test_iterative_is_the_derivative_of_the_real_steps(case: int, steps: int) -> None:
    problem, optimizer = trained(case)
    lam = flat(problem.lam)
    torch.manual_seed(case)
    direction, h = torch.randn_like(lam), 2e-5
    values = [after_steps(problem, optimizer, steps, lam + k * h * direction) for k in (-2, -1, 1, 2)]
    expected = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)  # of fourth order
    before = snapshot((*problem.theta, *problem.lam))
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for checkpoint in (False, True):
        out = meta_grad(problem, optimizer, algorithm=Iterative(steps=steps, checkpoint=checkpoint))
        got = float(flat(out.grads) @ direction)
        assert abs(got - expected) < 1e-6 * float(flat(out.grads).norm() * direction.norm()), (got, expected)
        assert abs(float(out.meta_loss) - after_steps(problem, optimizer, steps, lam)) < 1e-12
    assert all(same_bits(a, b) for a, b in zip(before, (*problem.theta, *problem.lam), strict=True))
    now = optimizer.state_dict()["state"]
    for row, values_of in state.items():
        for key, value in values_of.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(now[row][key]))


@pytest.mark.parametrize(
    "options",
    [{"nesterov": True}, {"dampening": 0.4, "weight_decay": 0.1}, {"maximize": True, "weight_decay": 0.1}],
    ids=["nesterov", "dampening", "maximize"],
)
@pytest.mark.parametrize("steps", [1, 3])
def test_from_momentum_that_has_not_begun(options: dict[str, Any], steps: int) -> None:
    """A new SGD for each task, as in MAML: torch makes the first buffer by `detach`, but the step depends on it."""
    problem = weight_net(3, recorded=False)
    optimizer = torch.optim.SGD(problem.theta, lr=0.1, momentum=0.9, **options)
    lam, h = flat(problem.lam), 2e-5
    torch.manual_seed(steps)
    direction = torch.randn_like(lam)
    values = [after_steps(problem, optimizer, steps, lam + k * h * direction) for k in (-2, -1, 1, 2)]
    expected = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)
    optimizer = torch.optim.SGD(problem.theta, lr=0.1, momentum=0.9, **options)
    for checkpoint in (False, True):
        out = meta_grad(problem, optimizer, algorithm=Iterative(steps=steps, checkpoint=checkpoint))
        got = float(flat(out.grads) @ direction)
        assert abs(got - expected) < 1e-6 * float(flat(out.grads).norm() * direction.norm()), (got, expected)
    assert not out.degenerate and not optimizer.state


def test_one_step_of_sgd_is_its_formula() -> None:
    """DARTS: d at theta' = theta - lr g, times -lr d^2 L_base / dlambda dtheta at theta."""
    problem = weight_net(0, recorded=False)
    optimizer = torch.optim.SGD(problem.theta, lr=0.3)
    problem.step(optimizer)
    g = torch.autograd.grad(problem.base_loss(), problem.theta, create_graph=True)
    theta = snapshot(problem.theta)
    with torch.no_grad():
        for p, x in zip(problem.theta, g, strict=True):
            p.sub_(0.3 * x)
    d = torch.autograd.grad(problem.meta_loss(), problem.theta)
    with torch.no_grad():
        for p, old in zip(problem.theta, theta, strict=True):
            p.copy_(old)
    g = torch.autograd.grad(problem.base_loss(), problem.theta, create_graph=True)
    expected = flat(torch.autograd.grad(g, problem.lam, [-0.3 * x for x in d]))
    assert relative_error(flat(meta_grad(problem, optimizer, algorithm="iterative").grads), expected) < 1e-12


def test_a_closure_for_each_step() -> None:
    problem, optimizer = trained(1)
    shares = (0.2, 0.5, 0.3)
    losses = [lambda share=share: share * problem.base_loss() for share in shares]
    arguments = {"base_params": problem.net, "meta_params": problem.weigher, "optimizer": optimizer}
    results = []
    for checkpoint in (False, True):
        algorithm = Iterative(3, per_step=True, checkpoint=checkpoint)
        results.append(flat(sk.meta_grad(losses, problem.meta_loss, algorithm=algorithm, **arguments).grads))
    assert relative_error(*results) < 1e-12
    summed = flat(sk.meta_grad(losses, problem.meta_loss, algorithm=Iterative(3), **arguments).grads)
    assert relative_error(summed, flat(meta_grad(problem, optimizer, algorithm=Iterative(3)).grads)) < 1e-10
    assert relative_error(results[0], summed) > 1e-3
    with pytest.raises(ValueError, match="base_loss: 3 closures for 2 steps"):
        sk.meta_grad(losses, problem.meta_loss, algorithm=Iterative(2, per_step=True), **arguments)


def test_what_iterative_refuses() -> None:
    problem = weight_net(0, recorded=False)
    optimizer = torch.optim.Adafactor(problem.theta)
    problem.step(optimizer)
    with pytest.raises(NotImplementedError, match="Adafactor has no option `differentiable`"):
        meta_grad(problem, optimizer, algorithm="iterative")
    x = torch.ones(3, requires_grad=True)
    lam = torch.ones(3, requires_grad=True)
    sgd = torch.optim.SGD([x], lr=0.1)
    (lam * x).sum().backward()
    sgd.step()
    with pytest.raises(ValueError, match="base_params: tensor 0 was found in no module"):
        sk.meta_grad(
            lambda: (lam * x.square()).sum(), lambda: x.sum(), base_params=[x], meta_params=[lam], optimizer=sgd,
            algorithm="iterative",
        )  # fmt: skip


def with_buffers(seed: int) -> tuple[nn.Module, Tensor, Any, Any]:
    """Dropout and batch statistics: the steps draw random numbers and move buffers."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1)
    ).double()
    lam = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(10, 4).double(), torch.randn(10, 1).double()
    x_meta, y_meta = torch.randn(6, 4).double(), torch.randn(6, 1).double()

    def base_loss() -> Tensor:
        return (lam.sigmoid() * (net(x) - y).square().squeeze(1)).mean()

    return net, lam, base_loss, lambda: (net(x_meta) - y_meta).square().mean()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("case", [0, 1, 3, 6])
def test_advance_makes_the_steps(case: int, before: int, checkpoint: bool) -> None:
    """theta, the optimizer's state, buffers and the generator end where real steps lead; the meta gradient is that
    of the same call without it."""
    ends, grads = [], []
    for advance in (None, False, True):
        net, lam, base_loss, meta_loss = with_buffers(case)
        optimizer = OPTIMIZERS[case][0](net.parameters(), **OPTIMIZERS[case][1])
        for _ in range(before if advance is not None else before + 3):
            optimizer.zero_grad()
            base_loss().backward()
            optimizer.step()
            lam.grad = None
        if advance is not None:
            out = sk.meta_grad(
                base_loss, meta_loss, base_params=net, meta_params=[lam], optimizer=optimizer,
                algorithm=Iterative(steps=3, checkpoint=checkpoint, advance=advance),
            )  # fmt: skip
            grads.append(out.grads[0])
        if advance is not False:
            ends.append((net, optimizer, torch.rand(3)))
    assert torch.equal(*grads) and grads[0].norm() > 0
    (net, optimizer, drawn), (net_again, optimizer_again, drawn_again) = ends
    assert torch.equal(drawn, drawn_again)
    # torch creates its scalars in float32: there NAdam keeps a product, and a differentiable first step of Adam makes
    # 1 - 0.999, which has 5 digits.
    rtol = 1e-4 if before == 0 else 1e-6 if OPTIMIZERS[case][0] is torch.optim.NAdam else 1e-12
    for a, b in zip((*net.parameters(), *net.buffers()), (*net_again.parameters(), *net_again.buffers()), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol / 100)
    state, state_again = optimizer.state_dict()["state"], optimizer_again.state_dict()["state"]
    assert state.keys() == state_again.keys()
    for row in state:
        for key, value in state[row].items():
            other = state_again[row][key]
            assert type(value) is type(other) and getattr(value, "dtype", None) == getattr(other, "dtype", None)
            if value is not None:
                torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(other), rtol=rtol, atol=rtol / 100)
    optimizer_again.step()  # goes on from there


def test_advance_moves_nothing_after_an_error() -> None:
    net, lam, base_loss, _ = with_buffers(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    everything = snapshot((*net.parameters(), *net.buffers()))
    rng = torch.get_rng_state()

    def fails() -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        sk.meta_grad(
            base_loss, fails, base_params=net, meta_params=[lam], optimizer=optimizer,
            algorithm=Iterative(steps=2, advance=True),
        )  # fmt: skip
    assert all(same_bits(a, b) for a, b in zip(everything, (*net.parameters(), *net.buffers()), strict=True))
    assert torch.equal(rng, torch.get_rng_state()) and not optimizer.state


ADAM = {
    "plain": (torch.optim.Adam, {"lr": 0.02}),
    "L2, maximize": (torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.1, "maximize": True, "betas": (0.8, 0.95)}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "decoupled": (torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.1, "decoupled_weight_decay": True}),
}


@pytest.mark.parametrize("piece", [9, adam_step.PIECE])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", ADAM)
def test_adam_in_closed_form_is_autograd_through_torchs(
    name: str, checkpoint: bool, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups, one parameter with fewer steps behind it, one that the base loss does not read."""
    monkeypatch.setattr(adam_step, "PIECE", piece)
    problem = weight_net(7, recorded=False)
    problem.net.register_parameter("idle", nn.Parameter(torch.randn(2).double()))
    optimizer_type, options = ADAM[name]
    theta = list(problem.theta)
    optimizer = optimizer_type([{"params": theta[:2]}, {"params": theta[2:], "lr": 0.05}], **options)
    for step in range(4):
        optimizer.zero_grad()
        problem.base_loss().backward()
        if step < 2:
            theta[1].grad = None
        optimizer.step()
    problem.weigher.zero_grad()
    algorithm = Iterative(steps=3, checkpoint=checkpoint)
    made = []
    step_itself = adam_step.step
    monkeypatch.setattr(adam_step, "step", lambda *args: made.append(1) or step_itself(*args))
    closed = meta_grad(problem, optimizer, algorithm=algorithm)
    assert len(made) == (6 if checkpoint else 3)
    monkeypatch.setattr(adam_step, "fits", lambda *_: False)
    autograd = meta_grad(problem, optimizer, algorithm=algorithm)
    assert len(made) == (6 if checkpoint else 3)
    assert relative_error(flat(closed.grads), flat(autograd.grads)) < 1e-12
    torch.testing.assert_close(closed.meta_loss, autograd.meta_loss, rtol=1e-14, atol=0)


def test_adam_where_no_gradient_has_been() -> None:
    """torch's differentiable step has sqrt's derivative at 0 there, and so NaN everywhere; the limit is 0."""
    torch.manual_seed(1)
    net = nn.Embedding(6, 3).double()
    lam = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)

    def base_loss() -> Tensor:
        return (lam.exp() * net(torch.tensor([1, 4])).square().sum(1)).sum()

    out = sk.meta_grad(
        base_loss, lambda: net(torch.tensor([1, 2])).sin().sum(), base_params=net, meta_params=[lam],
        optimizer=optimizer, algorithm=Iterative(steps=2),
    )  # fmt: skip
    assert out.grads[0][0] != 0 and out.grads[0][1] == 0 and not out.degenerate


def test_what_adam_in_closed_form_leaves_to_torch() -> None:
    p = [nn.Parameter(torch.ones(2))]
    assert adam_step.fits(torch.optim.AdamW(p), [{}]) and adam_step.fits(torch.optim.Adam(p), [{}])
    for optimizer in (
        torch.optim.Adam(p, amsgrad=True), torch.optim.Adam(p, lr=torch.tensor(0.1), foreach=False),
        torch.optim.NAdam(p), type("Mine", (torch.optim.Adam,), {})(p),
    ):  # fmt: skip
        assert not adam_step.fits(optimizer, [{}])


class Centred(nn.Module):
    """Its outputs depend on a running mean, which every call moves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 8, dtype=torch.float64)
        self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layer(x)
        with torch.no_grad():
            self.mean.mul_(0.5).add_(0.5 * h.mean(0))
        return h - self.mean.clone()


@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_that_is_made_again_sees_its_own_buffers(steps: int) -> None:
    torch.manual_seed(13)
    net = nn.Sequential(Centred(), nn.Tanh(), nn.Linear(8, 1, dtype=torch.float64))
    lam = torch.zeros(6, 1, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)

    def base_loss() -> Tensor:
        return (lam.sigmoid() * (net(x) - y).square()).mean()

    base_loss().backward()
    optimizer.step()
    mean = net[0].mean.clone()
    found = [
        sk.meta_grad(
            base_loss, lambda: (net(x) - 1).square().mean(), base_params=net, meta_params=[lam], optimizer=optimizer,
            algorithm=Iterative(steps=steps, checkpoint=checkpoint),
        ).grads[0]
        for checkpoint in (False, True)
    ]  # fmt: skip
    assert found[0].norm() > 0 and relative_error(found[1], found[0]) < 1e-12
    assert torch.equal(net[0].mean, mean)
