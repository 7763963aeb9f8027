"""Meta steps under a GradScaler: the same numbers as without it, no meta gradient from skipped steps, no overflow."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from clipped import SHAPES, adapted_through_meta_grad
from op_cases import SEED
from problems import flat, relative_error, same_bits
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode

import sama_kernels as sk

SCALE = 2.0**14


@pytest.fixture(autouse=True)
def fresh_inputs() -> Iterator[None]:
    """Other random inputs in every run; pytest shows the printed line when a test fails."""
    print(f"repeat with SAMA_TEST_SEED={SEED}")
    torch.manual_seed(SEED)
    yield


class Loop:
    """A small classifier trained with learned weights of its examples, as one trains with a GradScaler."""

    def __init__(self, optimizer_type: Any, scaler: GradScaler | None, **options: Any) -> None:
        generator = torch.Generator().manual_seed(SEED)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        for p in self.net.parameters():
            p.data = torch.randn(p.shape, generator=generator) / 3
        self.x, self.y = torch.randn(16, 6, generator=generator), torch.randn(16, 1, generator=generator)
        self.lam = torch.randn(16, 1, generator=generator).requires_grad_()
        self.optimizer = optimizer_type(self.net.parameters(), lr=0.05, **options)
        self.scaler = scaler

    def base_loss(self) -> Tensor:
        return (self.lam.sigmoid() * (self.net(self.x) - self.y).square()).mean()

    def meta_loss(self) -> Tensor:
        return (self.net(self.x) - 1).square().mean() + (self.lam**2).sum()

    def step(self, *, overflow: bool = False, unscale: bool = False, update: bool = True, keep: bool = False) -> None:
        self.optimizer.zero_grad(set_to_none=not keep)
        loss = self.base_loss() * (math.inf if overflow else 1.0)
        if self.scaler is None:
            loss.backward()  # type: ignore[no-untyped-call]
            return self.optimizer.step()
        self.scaler.scale(loss).backward()
        if unscale:
            self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        if update:
            self.scaler.update()

    def meta_grad(self, **options: Any) -> sk.MetaGradient:
        arguments = {"grad_scaler": self.scaler, "optimizer": self.optimizer, "alpha": 0.01, **options}
        return sk.meta_grad(self.base_loss, self.meta_loss, base_params=self.net, meta_params=[self.lam], **arguments)


OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.SGD, {"fused": True}),  # not with momentum: torch leaves its buffer undefined at a skipped first step
    (torch.optim.Adam, {"foreach": True}),
    (torch.optim.AdamW, {"fused": True}),
]


def same(a: sk.MetaGradient, b: sk.MetaGradient) -> bool:
    names = ("meta_loss", "base_loss_plus", "base_loss_minus", "norm", "epsilon", "degenerate")
    pairs = [*zip(a.grads, b.grads, strict=True), *((getattr(a, n).float(), getattr(b, n).float()) for n in names)]
    return all(same_bits(x, y) for x, y in pairs)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("case", range(len(OPTIMIZERS)))
def test_a_power_of_two_changes_no_bit(case: int, update: bool, unscale: bool) -> None:
    """Also a twin without a scaler agrees, whose `.grad` were never scaled: what D reads is unscaled in every case."""
    optimizer_type, options = OPTIMIZERS[case]
    loop = Loop(optimizer_type, GradScaler("cpu", init_scale=SCALE, growth_interval=2), **options)
    twin = Loop(optimizer_type, None, **options)
    for k in range(4):
        loop.step(unscale=unscale, update=update or k < 3)
        twin.step()
    out = loop.meta_grad()
    assert not out.degenerate and out.norm > 0
    assert same(out, twin.meta_grad()) and same(out, loop.meta_grad(grad_scaler=None))
    assert same(out, loop.meta_grad(grad_scaler=GradScaler("cpu", enabled=False)))


def test_any_scale_is_divided_out_and_clipping_goes_along() -> None:
    """In float64 the scale cancels to rounding: in ||v||, epsilon, the difference and the explicit gradient."""
    params = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in SHAPES]
    optimizer = torch.optim.Adam(params, lr=0.1)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        total = torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    d = [torch.randn_like(p).detach() for p in params]
    for options in ({}, {"clip_coef": sk.clip_coef(total, 1.0)}, {"clip_coef": 0.3, "clip_rank_one": True}):
        plain, expected = adapted_through_meta_grad(params, optimizer, d, **options)
        scaler = GradScaler("cpu", init_scale=12345.678)
        got, out = adapted_through_meta_grad(params, optimizer, d, grad_scaler=scaler, **options)
        assert relative_error(flat(got), flat(plain)) < 1e-12
        for name in ("norm", "epsilon", "meta_loss"):
            assert relative_error(getattr(out, name), getattr(expected, name)) < 1e-12


SKIPS = list(itertools.product([False, True], [False, True], [False, True], [0, 3]))


@pytest.mark.parametrize(("unscale", "update", "keep", "steps"), SKIPS)
@pytest.mark.parametrize("case", range(len(OPTIMIZERS)))
def test_no_meta_gradient_from_a_skipped_step(case: int, unscale: bool, update: bool, keep: bool, steps: int) -> None:
    optimizer_type, options = OPTIMIZERS[case]
    loop = Loop(optimizer_type, GradScaler("cpu", init_scale=SCALE), **options)
    for _ in range(steps):
        loop.step(unscale=unscale, keep=keep)
    before = copy.deepcopy(loop.net.state_dict())
    loop.step(overflow=True, unscale=unscale, update=update, keep=keep)
    for adaptation in ("paper", "exact", "none"):
        for update_base in (False, True):
            out = loop.meta_grad(adaptation=adaptation, update_base=update_base)
            assert out.degenerate and out.norm == 0 and out.epsilon == 0
            assert all((g == 0).all() for g in out.grads) and out.meta_loss == loop.meta_loss()
            assert all(same_bits(before[name], p) for name, p in loop.net.state_dict().items())
    if update:
        loop.step(unscale=unscale)
        assert not loop.meta_grad(adaptation="none").degenerate
        loop.step(unscale=unscale)
        assert not loop.meta_grad().degenerate


def test_a_skipped_step_without_the_argument() -> None:
    """A fused optimizer's step says itself that it was idle; any other leaves the wrong `.grad`, which is an error."""
    for fused in (False, True):
        loop = Loop(torch.optim.Adam, GradScaler("cpu", init_scale=SCALE), fused=fused)
        loop.step()
        loop.step()
        loop.step(overflow=True)
        if fused:
            assert loop.meta_grad(grad_scaler=None).degenerate
        else:
            with pytest.raises(ValueError, match=r"base_params: the \.grad of tensor 0 .*pass grad_scaler="):
                loop.meta_grad(grad_scaler=None)


@pytest.mark.parametrize("case", range(len(OPTIMIZERS)))
def test_cleared_gradients_are_an_error_even_where_d_does_not_read_them(case: int) -> None:
    optimizer_type, options = OPTIMIZERS[case]
    loop = Loop(optimizer_type, GradScaler("cpu", init_scale=SCALE), **options)
    loop.step()
    loop.optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"base_params: tensor 0 .* has no \.grad.*before zero_grad"):
        loop.meta_grad()


def test_a_meta_step_in_the_wrong_place_is_noticed() -> None:
    """Always before scaler.step: every meta step looks as if the step had been skipped."""
    loop = Loop(torch.optim.SGD, GradScaler("cpu", init_scale=SCALE))
    loop.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(9):
            loop.optimizer.zero_grad()
            loop.base_loss().backward()  # type: ignore[no-untyped-call]
            assert loop.meta_grad().degenerate
    with pytest.warns(UserWarning, match=r"grad_scaler: 10 meta steps in a row.*right after grad_scaler\.step"):
        loop.meta_grad()


def f16_through(x: Tensor, factor: float) -> Tensor:
    """The backward pass of `x` goes through float16, where `factor` of the gradient is all there is."""
    return (x * 1.0).half().float() * factor


@pytest.mark.parametrize("where", ["meta", "base"])
def test_what_underflows_without_a_scaler(where: str) -> None:
    """Gradients of 1e-9 are zero in float16, whose smallest number is 6e-8."""
    loop = Loop(torch.optim.SGD, GradScaler("cpu", init_scale=2.0**16))
    loop.step()
    size, net = 2.0**-26, loop.net

    def losses(half: bool) -> None:
        def through(x: Tensor, here: bool) -> Tensor:
            return f16_through(x, 1.0) if here and half else x

        def base_loss() -> Tensor:
            return size * (through(loop.lam.sigmoid(), where == "base") * (net(loop.x) - loop.y).square()).mean()

        def meta_loss() -> Tensor:
            return size * (through(net(loop.x), where == "meta") - 1).square().mean()

        loop.base_loss, loop.meta_loss = base_loss, meta_loss  # type: ignore[method-assign]

    losses(half=False)
    exact = loop.meta_grad(grad_scaler=None, alpha=0.5)
    losses(half=True)
    got, without = loop.meta_grad(alpha=0.5), loop.meta_grad(grad_scaler=None, alpha=0.5)
    assert exact.grads[0].abs().min() > 0 and not got.degenerate
    assert relative_error(got.grads[0], exact.grads[0]) < 0.02 and relative_error(got.norm, exact.norm) < 0.02
    assert not relative_error(without.grads[0], exact.grads[0]) < 0.5
    assert without.degenerate == (where == "meta")


@pytest.mark.parametrize("update_base", [False, True])
@pytest.mark.parametrize("where", ["d", "lambda"])
def test_overflow_of_the_scaled_gradients_is_degenerate(where: str, update_base: bool) -> None:
    """A gradient that float16 can hold, but not times the scale."""
    loop = Loop(torch.optim.SGD, GradScaler("cpu", init_scale=2.0**16))
    loop.step()
    plain_base, plain_meta = loop.base_loss, loop.meta_loss
    if where == "d":
        loop.meta_loss = lambda: (16 * f16_through(loop.net(loop.x), 1.0)).sum()  # type: ignore[method-assign]
    else:
        loop.base_loss = lambda: (  # type: ignore[method-assign]
            f16_through(loop.lam.sigmoid(), 1.0) * (loop.net(loop.x) - loop.y).square()
        ).sum()
    before = [p.detach().clone() for p in loop.net.parameters()]
    versions = [p._version for p in loop.net.parameters()]
    assert not loop.meta_grad(grad_scaler=None).degenerate
    out = loop.meta_grad(update_base=update_base)
    assert out.degenerate and out.epsilon == 0 and all((g == 0).all() for g in out.grads)
    assert all(same_bits(p, q) for p, q in zip(loop.net.parameters(), before, strict=True))
    if not update_base:
        assert versions == [p._version for p in loop.net.parameters()]
    loop.base_loss, loop.meta_loss = plain_base, plain_meta  # type: ignore[method-assign]
    assert not loop.meta_grad(update_base=update_base).degenerate
    moved = any(not same_bits(p, q) for p, q in zip(loop.net.parameters(), before, strict=True))
    assert moved == update_base
    # An older graph that saved theta may be used again if theta came back, and must not be if it moved.
    assert (versions == [p._version for p in loop.net.parameters()]) != update_base


class MyAdam(torch.optim.Adam):
    """Has no adaptation, so only D = I can be asked for, and its steps are not recorded."""


def test_d_is_the_identity_of_any_optimizer() -> None:
    loop = Loop(MyAdam, GradScaler("cpu", init_scale=SCALE))
    loop.step(overflow=True)
    assert loop.meta_grad(adaptation="none").degenerate
    with pytest.raises(TypeError, match=r"optimizer: no adaptation for .*MyAdam"):
        loop.meta_grad()
    loop.step()
    assert same(loop.meta_grad(adaptation="none"), loop.meta_grad(adaptation="none", grad_scaler=None))


class NoCopyToTheHost(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number was read on the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("case", range(len(OPTIMIZERS)))
def test_no_number_is_read_on_the_host(case: int, overflow: bool, backend: str) -> None:
    optimizer_type, options = OPTIMIZERS[case]
    loop = Loop(optimizer_type, GradScaler("cpu", init_scale=SCALE), **options)
    loop.step()
    loop.step(overflow=overflow)
    coef = torch.tensor(0.5)
    with NoCopyToTheHost():
        for clipping in ({"clip_coef": coef, "clip_rank_one": True}, {"clip_value": 0.1}):
            out = loop.meta_grad(backend=backend, update_base=True, **clipping)
    assert out.degenerate == overflow


@pytest.mark.gpu
@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_on_a_gpu_the_host_does_not_wait(fused: bool, overflow: bool) -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).cuda()
    x, lam = torch.randn(32, 64, device="cuda"), torch.zeros(32, 1, device="cuda", requires_grad=True)
    optimizer, scaler = torch.optim.Adam(net.parameters(), fused=fused), GradScaler("cuda", init_scale=SCALE)

    def base_loss(factor: float = 1.0) -> Tensor:
        with torch.autocast("cuda", dtype=torch.float16):
            return (lam.sigmoid() * net(x).float().square()).mean() * factor

    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(base_loss(math.inf if overflow and step == 2 else 1.0)).backward()
        scaler.unscale_(optimizer)
        total = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
        scaler.step(optimizer)
        scaler.update()
    arguments: dict[str, Any] = {
        "base_params": net, "meta_params": [lam], "optimizer": optimizer, "alpha": 0.1, "grad_scaler": scaler,
        "clip_coef": sk.clip_coef(total, 0.01), "clip_rank_one": True,
    }  # fmt: skip
    sk.meta_grad(base_loss, base_loss, **arguments)  # compiles and loads
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = sk.meta_grad(base_loss, base_loss, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.degenerate == overflow and (out.grads[0] == 0).all() == overflow


def test_bad_scaler() -> None:
    loop = Loop(torch.optim.SGD, None)
    loop.step()
    with pytest.raises(TypeError, match=r"grad_scaler: expected a torch\.amp\.GradScaler, got float"):
        loop.meta_grad(grad_scaler=2.0)
