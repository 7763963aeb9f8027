"""What a meta step must leave alone, in every way to differentiate along v (test_guards.py has more on the central
difference)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch._dynamo
from guarded import BACKENDS, PACKAGE, Broken, Explodes, Setting, assert_same, interrupted_at_every_line
from torch import Tensor, nn
from torch.autograd import forward_ad

import sama_kernels as sk
from sama_experiments.common.memory import peak_bytes

DIFFERENCES = ["forward", "exact"]


def state(setting: Setting) -> dict[str, Any]:
    theta = list(setting.net.parameters())
    with forward_ad.dual_level():  # raises if the level of the meta step was not left
        tangents = [forward_ad.unpack_dual(p).tangent is not None for p in (*theta, *setting.net.buffers())]
    return {
        **setting.state(),
        "versions": [t._version for t in (*theta, *setting.net.buffers(), setting.weights)],
        "tangents": tangents,
        "forward mode": torch._C._is_fwd_grad_enabled(),
        "modes": torch.overrides._len_torch_function_stack(),
        "functions": torch._C._is_torch_function_all_disabled(),
        "stance": str(torch._dynamo.eval_frame._stance),
        "storage": [p.data_ptr() for p in theta],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("difference", DIFFERENCES)
def test_success(difference: str, backend: str, dtype: torch.dtype) -> None:
    setting = Setting(dtype)
    before = state(setting)
    out = setting.meta_grad(backend=backend, difference=difference)
    assert not out.degenerate and out.grads[0].norm() > 0
    assert_same(before, state(setting))


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize(("difference", "call"), [("forward", 1), ("forward", 2), ("exact", 1)])
def test_an_error_in_a_closure(difference: str, call: int, error: type[BaseException]) -> None:
    setting = Setting()
    before = state(setting)
    first = setting.calls

    def failing() -> Tensor:
        loss = setting.base_loss()
        if setting.calls == first + call:
            setting.net[1].running_mean.fill_(7.0)  # type: ignore[union-attr, operator]
            raise error("on purpose")
        return loss

    with pytest.raises(error, match="on purpose"):
        setting.meta_grad(base_loss=failing, difference=difference, update_base=True)
    assert_same(before, state(setting))


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_an_error_in_backward(difference: str) -> None:
    setting = Setting()
    before = state(setting)
    with pytest.raises(Broken):
        setting.meta_grad(difference=difference, base_loss=lambda: Explodes.apply(setting.base_loss()))
    assert_same(before, state(setting))


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_ctrl_c_at_every_line(difference: str) -> None:
    setting = Setting()
    setting.meta_grad(difference=difference)

    def work() -> None:
        setting.meta_grad(difference=difference, alpha=sk.relative(1e-3))

    assert interrupted_at_every_line(work, lambda: state(setting)) > 130


def test_ctrl_c_at_every_line_of_diagnose() -> None:
    setting = Setting()
    arguments: dict[str, Any] = {
        "base_params": setting.net, "meta_params": [setting.weights], "optimizer": setting.optimizer, "alpha": 0.1,
    }  # fmt: skip
    sk.diagnose(setting.base_loss, setting.meta_loss, **arguments)

    def work() -> None:
        sk.diagnose(setting.base_loss, setting.meta_loss, **arguments)

    files = PACKAGE + r"/(diagnose|ladder|detach_watch)\.py$"
    assert interrupted_at_every_line(work, lambda: state(setting), files) > 100


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_dropout_masks_and_buffers_are_those_of_the_central_difference(difference: str) -> None:
    """With dropout at 0.3 and BatchNorm all three see the same function: they agree to rounding or to order alpha."""
    setting = Setting(torch.float64)
    for seed in range(3):
        torch.manual_seed(seed)
        central, other = (setting.meta_grad(difference=how, alpha=1e-6).grads[0] for how in ("central", difference))
        torch.testing.assert_close(other, central, rtol=1e-4, atol=1e-7 * float(central.abs().max()))


def test_a_graph_made_before_can_still_be_used() -> None:
    for difference in DIFFERENCES:
        setting = Setting(torch.float64)
        setting.net.eval()
        pending = setting.base_loss()
        setting.meta_grad(difference=difference)
        weight = setting.net[0].weight
        torch.testing.assert_close(
            torch.autograd.grad(pending, weight), torch.autograd.grad(setting.base_loss(), weight)
        )


def test_odd_bits_survive_exact() -> None:
    """NaN payloads (signalling ones too), infinities and signed zeros: theta is copied onto itself."""
    words = torch.tensor([0x7F800001, 0x7FC12345, -0x800000, 0x7F800000, -0x80000000, 1], dtype=torch.int64)
    odd = words.to(torch.int32).view(torch.float32)
    w = odd.clone().requires_grad_()
    lam = torch.ones(6, requires_grad=True)
    for options in ({}, {"update_base": True}, {"alpha": sk.relative(1e-3)}):
        out = sk.meta_grad(
            lambda: (lam * w).sum(), lambda: (w * math.nan).sum(), base_params=[w], meta_params=[lam], optimizer=None,
            adaptation="none", difference="exact", **options,
        )  # fmt: skip
        assert out.degenerate and torch.equal(w.detach().view(torch.int32), words.to(torch.int32))


def test_a_surrounding_dual_level_is_torchs_own_error() -> None:
    setting = Setting()
    before = state(setting)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="Nested forward mode AD is not supported"):
        setting.meta_grad(difference="exact")
    assert_same(before, state(setting))


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_one_extra_buffer_of_the_size_of_theta(difference: str) -> None:
    net = nn.Sequential(*[nn.Linear(256, 256) for _ in range(16)])
    weights = torch.rand(4, requires_grad=True)
    x = torch.randn(4, 256)
    size = sum(p.numel() for p in net.parameters()) * 4

    def meta_step() -> None:
        sk.meta_grad(
            lambda: (weights * net(x).square().mean(1)).mean(),
            lambda: net(x).square().mean(),
            base_params=net,
            meta_params=[weights],
            optimizer=None,
            adaptation="none",
            alpha=0.1,
            backend="cpu",
            difference=difference,
        )

    meta_step()
    extra = 1.02 if difference == "forward" else 1.1  # one more weight matrix while its tangent is set
    assert size <= peak_bytes(meta_step, torch.device("cpu"))[0] < extra * size
