"""bfloat16 and float16 models whose optimizer steps float32 master copies, and models that are 16-bit throughout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from clipped import SHAPES, adapted_through_meta_grad
from op_cases import SEED
from problems import flat, relative_error, same_bits
from stepping import adapted
from torch import Tensor, nn

import sama_kernels as sk

OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
]


@pytest.fixture(autouse=True)
def fresh_inputs() -> Iterator[None]:
    """Other random inputs in every run; pytest shows the printed line when a test fails."""
    print(f"repeat with SAMA_TEST_SEED={SEED}")
    torch.manual_seed(SEED)
    yield


class Masters:
    """A model in `dtype`, trained through float32 copies of its parameters as apex and Megatron do it."""

    def __init__(self, dtype: torch.dtype, optimizer_type: Any, **options: Any) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))
        for p in self.net.parameters():
            p.data = (torch.randn(p.shape, generator=generator) / 3).bfloat16().float()
        self.masters = [p.detach().clone().requires_grad_() for p in self.net.parameters()]
        self.net.to(dtype)
        self.x, self.y = (torch.randn(32, k, generator=generator).bfloat16().to(dtype) for k in (6, 1))
        self.lam = torch.randn(32, 1, generator=generator).requires_grad_()
        self.optimizer = optimizer_type(self.masters, **options)

    def base_loss(self) -> Tensor:
        return (self.lam.sigmoid() * (self.net(self.x) - self.y).float().square()).mean()

    def meta_loss(self) -> Tensor:
        return (self.net(self.x).float() - 1).square().mean()

    def step(self) -> None:
        self.net.zero_grad()
        self.base_loss().backward()  # type: ignore[no-untyped-call]
        for p, master in zip(self.net.parameters(), self.masters, strict=True):
            master.grad = p.grad.float() if p.grad is not None else None
        self.optimizer.step()
        with torch.no_grad():
            for p, master in zip(self.net.parameters(), self.masters, strict=True):
                p.copy_(master)

    def meta_grad(self, **options: Any) -> sk.MetaGradient:
        arguments = {"master_params": self.masters, "alpha": 0.5, **options}
        return sk.meta_grad(
            self.base_loss, self.meta_loss, base_params=self.net, meta_params=[self.lam], optimizer=self.optimizer,
            **arguments,
        )  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("mode", ["paper", "exact"])
@pytest.mark.parametrize("case", range(len(OPTIMIZERS)))
def test_d_is_the_masters(case: int, mode: str, backend: str) -> None:
    """v of the masters, in float64, though base_params are other tensors with other values and no `.grad`."""
    optimizer_type, options = OPTIMIZERS[case]
    masters = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in SHAPES]
    model = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in SHAPES]
    optimizer = optimizer_type(masters, **options)
    for _ in range(3):
        for p in masters:
            p.grad = torch.randn_like(p)
        optimizer.step()
    d = [torch.randn_like(p).detach() for p in model]
    expected, norm = adapted(optimizer, masters, d, mode, "reference")
    before = [p.detach().clone() for p in masters]
    got, out = adapted_through_meta_grad(
        model, optimizer, d, master_params=iter(masters), adaptation=mode, backend=backend
    )
    assert relative_error(flat(got), flat(expected)) < 1e-11 and relative_error(out.norm, norm) < 1e-12
    assert all(same_bits(p, q) for p, q in zip(masters, before, strict=True))
    clipped, _ = adapted_through_meta_grad(
        model, optimizer, d, master_params=masters, adaptation=mode, clip_coef=0.5, clip_rank_one=True
    )
    g, x = torch.cat([p.grad.flatten() for p in masters if p.grad is not None]), flat(expected)
    n = g.norm() / 0.5
    assert relative_error(flat(clipped), 0.5 * (x - g * (g @ x) / (g @ g) * n / (n + 1e-6))) < 1e-11


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", range(len(OPTIMIZERS)))
def test_a_16_bit_model_against_a_float32_one(case: int, dtype: torch.dtype, rounding: str) -> None:
    optimizer_type, options = OPTIMIZERS[case]
    if case > 0:  # with Adam's usual eps, D depends in cells of tiny gradients on bits that 16-bit gradients lack
        options = {**options, "eps": 0.1}
    narrow, wide = (Masters(t, optimizer_type, **options) for t in (dtype, torch.float32))
    for _ in range(5):
        narrow.step()
        wide.step()
    before = [p.detach().clone() for p in (*narrow.net.parameters(), *narrow.masters)]
    out, exact = narrow.meta_grad(rounding=rounding), wide.meta_grad()
    unit = torch.finfo(dtype).eps
    assert relative_error(out.norm, exact.norm) < 15 * unit
    assert relative_error(out.grads[0], exact.grads[0]) < 15 * unit
    assert out.realised is not None and abs(out.realised - 1) < 0.02
    after = [*narrow.net.parameters(), *narrow.masters]
    assert all(same_bits(p, q) for p, q in zip(after, before, strict=True))
    if rounding == "stochastic":
        assert not torch.equal(narrow.meta_grad(rounding=rounding, seed=1).grads[0], out.grads[0])


@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, torch.optim.AdamW])
def test_a_model_and_optimizer_in_bfloat16(optimizer_type: Any) -> None:
    """Everything in bfloat16, state included; the mean over stochastic roundings of a step so small that rounding to
    nearest loses much of it, against the same D in float32."""
    problem = Masters(torch.bfloat16, torch.optim.SGD, lr=0.1)
    net, x = problem.net, problem.x
    optimizer = optimizer_type(net.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        problem.base_loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    params = list(net.parameters())
    wide = [p.detach().float().requires_grad_() for p in params]
    precise = optimizer_type(wide, lr=0.01)
    state = optimizer.state_dict()
    precise.load_state_dict(state)
    for p, q in zip(params, wide, strict=True):
        q.grad = p.grad.float() if p.grad is not None else None
    d = torch.autograd.grad(problem.meta_loss(), params)
    v, norm = adapted(precise, wide, [g.float() for g in d], "paper", "reference")
    n = sum(p.numel() for p in params)
    # L_base is linear in theta: the meta gradient is -A v.
    a = torch.stack([flat(v) / norm, *torch.randn(2, n)])
    lam = torch.zeros(3, requires_grad=True)

    def base_loss() -> Tensor:
        return lam @ (a.double() @ torch.cat([p.double().flatten() for p in params])).float()

    def run(**options: Any) -> sk.MetaGradient:
        return sk.meta_grad(
            base_loss, problem.meta_loss, base_params=net, meta_params=[lam], optimizer=optimizer,
            alpha=0.002 * math.sqrt(n), **options,
        )  # fmt: skip

    # D counts as noise what bfloat16 moments cannot tell from 0: some cells more than with float32 ones.
    assert x.dtype == torch.bfloat16 and relative_error(run().norm, norm) < 2e-2
    samples = torch.stack([run(rounding="stochastic", seed=k).grads[0] for k in range(200)])
    error = samples.std(dim=0) / math.sqrt(len(samples))
    exact = -(a @ flat(v))
    assert ((samples.mean(dim=0) - exact).abs() < 5 * error + 0.02 * norm).all()


def masters() -> Masters:
    problem = Masters(torch.bfloat16, torch.optim.Adam, lr=0.1)
    problem.step()
    problem.step()
    return problem


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda m: {"master_params": m[:-1]}, ValueError, "master_params: 3 tensors for 4 base_params"),
    (lambda m: {"master_params": [m[1], m[0], *m[2:]]}, ValueError, r"master_params: tensor 0 has shape \(32,\), but"),
    (lambda m: {"master_params": [p.detach().clone() for p in m]}, ValueError, "master_params: 4 of 4 .* not held by"),
    (lambda m: {"master_params": None}, ValueError, "base_params: 4 of 4 tensors are not held by the optimizer"),
    (lambda m: {"master_params": [p.bfloat16() for p in m]}, TypeError, "master_params: tensor 0 is torch.bfloat16"),
    (lambda m: {"master_params": m[0]}, TypeError, "master_params: expected an iterable of tensors, got Tensor"),
    (lambda m: {"master_params": ["a"] * 4}, TypeError, "master_params: element 0 is a str"),
    (lambda m: {"update_base": True}, ValueError, "update_base: with master_params .* pass update_base=False"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_masters(case: int) -> None:
    make, error, message = BAD[case]
    problem = masters()
    with pytest.raises(error, match=message):
        problem.meta_grad(**make(problem.masters))


def test_gradients_are_those_of_the_masters() -> None:
    problem = masters()
    problem.net.zero_grad()  # not needed
    problem.meta_grad()
    problem.masters[2].grad = torch.zeros_like(problem.masters[2])
    with pytest.raises(ValueError, match=r"master_params: the \.grad of tensor 2 .* was changed or replaced"):
        problem.meta_grad()
    problem.masters[2].grad = None
    with pytest.raises(ValueError, match=r"master_params: tensor 2 .* has no \.grad"):
        problem.meta_grad()
