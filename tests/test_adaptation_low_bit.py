"""Adam with quantised moments (torchao, bitsandbytes) against its real steps, and against Adam on the same moments."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from problems import relative_error, same_bits
from stepping import adapted
from torch import Tensor

from sama_experiments.common.memory import peak_bytes
from sama_kernels import adaptation, ops

TORCHAO = ["AdamW8bit", "AdamW4bit", "AdamWFp8", "Adam8bit", "Adam4bit", "AdamFp8"]
BITSANDBYTES = ["AdamW8bit", "AdamW", "AdamW32bit", "Adam8bit", "Adam", "Adam32bit"]
TYPES = [*(("torchao.optim", t) for t in TORCHAO), *(("bitsandbytes.optim", t) for t in BITSANDBYTES)]
# Relative error of v against differences of the real step, after 2, 10 and 1000 steps: most at first, where D is a
# difference of moments that are about as large as each other. At step 1 the moments are known, and rounding is left.
ERRORS = {
    "8bit": {1: 2e-3, 2: 0.4, 10: 0.06, 1000: 2e-3},
    "4bit": {1: 2e-3, 2: 0.3, 10: 0.08, 1000: 2e-3},
    "Fp8": {1: 2e-3, 2: 0.06, 10: 0.02, 1000: 2e-3},
    "": {1: 2e-3, 2: 5e-4, 10: 2e-4, 1000: 2e-4},
}
ROWS = 32


@pytest.fixture(autouse=True)
def _without_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao compiles its step, which takes a C++ compiler 15 s; the same function runs as it is."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def _type(module: str, name: str) -> Any:
    return getattr(pytest.importorskip(module), name)


def _stepped(optimizer_type: Any, steps: int, last: float = 0.0, **options: Any) -> tuple[list[Tensor], Any]:
    """A large parameter (quantised moments) and a small one (not), after steps on gradients of a size of its own for
    each cell. `last` times that size is added to the last ones; theta is 0 before that step, so that differences of it
    are not rounded away."""
    torch.manual_seed(steps)
    dtype = options.pop("dtype", torch.float32)
    params = [torch.randn(s, dtype=dtype).requires_grad_() for s in ((ROWS, 128), (5,))]
    optimizer = optimizer_type(params, **{"lr": 1e-3, "eps": 1e-3, **options})
    sizes = [_sizes(p) for p in params]
    for k in range(steps):
        for p, size in zip(params, sizes, strict=True):
            p.grad = size * (0.5 + torch.rand_like(p)) * torch.randn_like(p).sign()
            if k == steps - 1:
                p.data.zero_()
                p.grad += last * size
        optimizer.step()
    return params, optimizer


def _sizes(p: Tensor) -> Tensor:
    """From 0.1 to 10, in every block of the storage: the larger ones decide how coarse it is for the others."""
    sizes = torch.logspace(-1, 1, p.numel())
    return sizes.reshape(-1, ROWS).T.reshape(p.shape).to(p.dtype) if p.dim() == 2 else sizes.to(p.dtype)


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
@pytest.mark.parametrize(("module", "name"), TYPES)
def test_v_is_the_derivative_of_the_real_step_up_to_quantisation(module: str, name: str, steps: int) -> None:
    optimizer_type, h = _type(module, name), 1e-2
    params, optimizer = _stepped(optimizer_type, steps)
    plus, minus = (_stepped(optimizer_type, steps, side * h)[0] for side in (1, -1))
    d = [torch.randn_like(p) for p in params]
    got, _ = adapted(optimizer, params, d, "exact", "cpu")
    bits = name.removeprefix("Adam").removeprefix("W").removeprefix("32bit")
    for p, x, v, after_plus, after_minus, allowed in zip(params, d, got, plus, minus, (bits, ""), strict=True):
        expected = (-(after_plus - after_minus) / (2 * h * _sizes(p)) * x).detach()
        assert relative_error(v, expected) < ERRORS[allowed][steps]


@pytest.mark.parametrize("mode", ["paper", "exact"])
@pytest.mark.parametrize(("module", "name"), TYPES)
def test_v_is_that_of_adam_at_the_stored_moments(module: str, name: str, mode: str) -> None:
    """Section 3.2's D in float64, from the moments as the package itself dequantises them."""
    params, optimizer = _stepped(_type(module, name), 10)
    d = [torch.randn_like(p) for p in params]
    got, norm = adapted(optimizer, params, d, mode, "cpu")
    c1, c2 = 1 - 0.9**10, 1 - 0.999**10
    expected = []
    for p, x in zip(params, d, strict=True):
        m, w = (_dequantised(optimizer.state[p], which).double() for which in (1, 2))
        g = p.grad.double()
        s = (torch.maximum(w, 0.001 * g * g) / c2).sqrt()
        q = s + 1e-3
        r = 0.1 * (s if mode == "paper" else q) - 0.001 * m * g / (c2 * s)
        expected.append(1e-3 / c1 * r / q**2 * x)
    for v, e in zip(got, expected, strict=True):
        assert relative_error(v, e) < 1e-5
    assert relative_error(norm, torch.cat([e.flatten() for e in expected]).norm()) < 1e-5


def _dequantised(state: dict[str, Any], which: int) -> Tensor:
    if f"state{which}" in state:
        codes = state[f"state{which}"]
        if codes.dtype == torch.float32:
            return codes
        functional = importlib.import_module("bitsandbytes.functional")
        quantised = {"absmax": state[f"absmax{which}"], "code": state[f"qmap{which}"], "blocksize": 256}
        return functional.dequantize_blockwise(codes, **quantised)
    stored = state[("exp_avg", "exp_avg_sq")[which - 1]]
    return stored if type(stored) is Tensor else stored.dequantize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
@pytest.mark.parametrize(("module", "name"), TYPES)
def test_codes_are_read_as_the_package_reads_them(module: str, name: str, steps: int, dtype: torch.dtype) -> None:
    """The bits of Adam's D at the moments which the package dequantises, with what is known of them put right."""
    params, optimizer = _stepped(_type(module, name), steps, dtype=dtype)
    d = [torch.randn_like(p) for p in params]
    for mode in ("paper", "exact"):
        expected = [_at_moments_of_the_package(optimizer, p, x, mode) for p, x in zip(params, d, strict=True)]
        got, _ = adapted(optimizer, params, d, mode, "cpu")
        assert all(map(same_bits, got, expected))


def _at_moments_of_the_package(optimizer: Any, p: Tensor, d: Tensor, mode: str) -> Tensor:
    v, state, group = d.clone(), optimizer.state[p], optimizer.param_groups[0]
    m, w = (_dequantised(state, which) for which in (1, 2))
    if _is_quantised(state):
        g = p.grad.float()
        added = (1 - 0.999) * g.square()
        m, w = ((1 - 0.9) * g, added) if state["step"] == 1 else (m, torch.maximum(w, added))
    ops.adapt_norm_adam(
        [v], [p.grad], [m], [w], [], [], [torch.tensor(float(state["step"]))], lr=group["lr"], beta1=0.9, beta2=0.999,
        eps=group["eps"], weight_decay=0.0, maximize=False, mode=ops.PAPER if mode == "paper" else ops.EXACT,
        backend="cpu",
    )  # fmt: skip
    return v


def _is_quantised(state: dict[str, Any]) -> bool:
    return type(state["exp_avg"]) is not Tensor if "exp_avg" in state else state["state1"].dtype == torch.uint8


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
@pytest.mark.parametrize("block_size", [100, 5000])
def test_block_sizes_of_torchao(name: str, block_size: int) -> None:
    p = torch.randn(50, 100, requires_grad=True)
    optimizer = _type("torchao.optim", name)([p], block_size=block_size)
    for _ in range(2):
        p.grad = torch.randn(50, 100)
        optimizer.step()
    d = torch.randn(50, 100)
    (got,), _ = adapted(optimizer, [p], [d], "exact", "cpu")
    assert same_bits(got, _at_moments_of_the_package(optimizer, p, d, "exact"))


@pytest.mark.parametrize(("module", "name"), TYPES)
def test_one_call_for_all_quantised_parameters_and_one_for_the_others(module: str, name: str) -> None:
    params = [torch.randn(s, requires_grad=True) for s in ((64, 100), (5,), (128, 128), (7,), (80, 80))]
    optimizer = _type(module, name)(params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    calls = {call.op.__name__: len(call.rows) for call in adaptation.plan(optimizer, params, "paper")}
    low_bit = name.endswith(("8bit", "4bit", "Fp8"))
    assert calls == ({"adapt_norm_low_bit_adam": 3, "adapt_norm_adam": 2} if low_bit else {"adapt_norm_adam": 5})


def test_second_moments_that_were_rounded_to_zero() -> None:
    """One cell of a block is so large that w of the others is stored as 0. To the letter of that state D would be
    lr (1 - beta1) / (c1 eps), 1e5 times too much; the step itself added (1 - beta2) g^2 to it."""
    p = torch.zeros(4096, requires_grad=True)
    optimizer = _type("torchao.optim", "AdamWFp8")([p], lr=1e-3)
    for _ in range(3):
        p.grad = torch.full((4096,), 1e-3)
        p.grad[::128] = 1e3
        optimizer.step()
    assert (_dequantised(optimizer.state[p], 2)[1:128] == 0).all()
    (v,), _ = adapted(optimizer, [p], [torch.ones(4096)], "exact", "cpu")
    assert v[1:128].abs().max() < 10 * 1e-3 / 1e-3  # u = lr g / |g|: a slope of at most about lr / |g|


@pytest.mark.parametrize(("module", "name"), [("torchao.optim", "AdamW8bit"), ("bitsandbytes.optim", "AdamW8bit")])
def test_first_step_is_degenerate_under_paper(module: str, name: str) -> None:
    """As with Adam: D = 0 in real numbers, of which quantised moments would leave noise."""
    params, optimizer = _stepped(_type(module, name), 1)
    _, norm = adapted(optimizer, params, [torch.randn_like(p) for p in params], "paper", "cpu")
    assert norm == 0


@pytest.mark.parametrize(("module", "name"), [("torchao.optim", "AdamW4bit"), ("bitsandbytes.optim", "AdamW8bit")])
def test_bfloat16_parameters_and_untouched_state(module: str, name: str) -> None:
    params, optimizer = _stepped(_type(module, name), 3, dtype=torch.bfloat16)
    stored = [_dequantised(optimizer.state[p], which).clone() for p in params for which in (1, 2)]
    before = [p.detach().clone() for p in params]
    v, norm = adapted(optimizer, params, [torch.randn_like(p) for p in params], "paper", "cpu")
    assert all(x.dtype == torch.bfloat16 for x in v) and norm > 0
    again = [_dequantised(optimizer.state[p], which) for p in params for which in (1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(stored, again, strict=True))
    assert all(same_bits(a, b) for a, b in zip(params, before, strict=True))


@pytest.mark.parametrize(("module", "name"), [("torchao.optim", "AdamW8bit"), ("bitsandbytes.optim", "AdamW8bit")])
def test_lr_is_that_of_the_step(module: str, name: str) -> None:
    params, optimizer = _stepped(_type(module, name), 3)
    d = [torch.randn_like(p) for p in params]
    before, _ = adapted(optimizer, params, d, "exact", "cpu")
    lr = optimizer.param_groups[0]["lr"]
    if isinstance(lr, Tensor):
        lr.fill_(1.0)
    else:
        optimizer.param_groups[0]["lr"] = 1.0
    after, _ = adapted(optimizer, params, d, "exact", "cpu")
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(("module", "name"), [("torchao.optim", "AdamW8bit"), ("bitsandbytes.optim", "AdamW8bit")])
def test_no_memory_beyond_v(module: str, name: str) -> None:
    """But for a few bytes: what the op returns, and counters."""
    peaks = []
    for count in (1, 6):
        params = [torch.randn(64, 1024, requires_grad=True) for _ in range(count)]
        optimizer = _type(module, name)(params)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        d: list[Tensor | None] = [torch.randn(64, 1024) for _ in params]

        def work(optimizer: Any = optimizer, params: Any = params, d: Any = d) -> None:
            adaptation.apply(adaptation.plan(optimizer, params, "paper"), d, "cpu")

        peaks.append(peak_bytes(work, torch.device("cpu"))[0])
    assert 0 < peaks[0] <= peaks[1] < 1000


def _torchao(name: str, **options: Any) -> Any:
    return lambda p: _type("torchao.optim", name)([p], **options)


def _bitsandbytes(name: str, args: dict[str, Any] | None = None, override: str | None = None) -> Any:
    def make(p: Tensor) -> Any:
        optimizer = _type("bitsandbytes.optim", name)([p])
        for key, value in (args or {}).items():
            setattr(optimizer.args, key, value)
        if override is not None:
            optimizer.mng.pid2config[id(p)] = {override: 0.5}
        return optimizer

    return make


REFUSED = {
    "coupled decay": (_torchao("Adam8bit", weight_decay=0.1), r"weight_decay of torchao's Adam.*use AdamW8bit"),
    "amsgrad": (_torchao("AdamW8bit", amsgrad=True), r"amsgrad of torchao.*use amsgrad=False"),
    "max_unorm": (_bitsandbytes("AdamW8bit", {"max_unorm": 1.0}), r"max_unorm and skip_zeros.*leave them"),
    "skip_zeros": (_bitsandbytes("AdamW8bit", {"skip_zeros": True}), r"max_unorm and skip_zeros.*leave them"),
    "override": (_bitsandbytes("AdamW8bit", override="lr"), r"GlobalOptimManager overrides of lr.*parameter groups"),
    "paged": (_bitsandbytes("PagedAdamW8bit"), r"PagedAdamW8bit has no adaptation.*use AdamW8bit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    make, message = REFUSED[case]
    p = torch.randn(8, requires_grad=True)
    optimizer = make(p)
    try:
        with pytest.raises(TypeError, match=r"^optimizer: .*" + message + r'.*adaptation="none"$'):
            adaptation.plan(optimizer, [p], "paper")
    finally:
        if hasattr(optimizer, "mng"):  # there is one for all, and a later tensor may have the same id
            optimizer.mng.pid2config.pop(id(p), None)


def test_an_override_of_the_number_of_bits_is_no_matter() -> None:
    p = torch.randn(8, requires_grad=True)
    optimizer = _bitsandbytes("AdamW8bit", override="min_8bit_size")(p)
    p.grad = torch.randn(8)
    optimizer.step()
    assert adaptation.plan(optimizer, [p], "paper")


def test_blocks_that_follow_the_memory_are_refused() -> None:
    p = torch.randn(4, 8, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    optimizer = _bitsandbytes("AdamW8bit")(p)
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.state[p]["state1"].dtype == torch.uint8
    with pytest.raises(TypeError, match="a parameter that is not row-major has no adaptation"):
        adaptation.plan(optimizer, [p], "paper")
