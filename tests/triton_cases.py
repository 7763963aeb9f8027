"""What the Triton kernels are compiled for ahead of time: the launches that the ops really make, recorded on the CPU.

Each case calls an op on small CPU tensors while `JITFunction.run` only takes notes, so a case cannot name arguments,
dtypes or options that the host code does not launch with.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
from low_bit_cases import LowBit
from moments_cases import Moments, Variant
from op_cases import BF16, F16, F32, F64, Adam, randn
from torch import Tensor
from triton.runtime.jit import JITFunction

from sama_kernels import ops
from sama_kernels.backends import triton as package

ARCHITECTURES = (80, 90, 100)
LENGTH = 5000  # several blocks and a tail

# "torch.float32" -> "fp32", as Triton's signatures spell it.
_SPELLING = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16", "uint8": "u8", "int64": "i64"}


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel, as `triton.compiler.ASTSource` wants it."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.kernel.__name__} {self.signature} {self.constants} {self.options}"


def modules() -> list[Any]:
    """Every module of the backend, found on disk."""
    return [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]


def jit_functions() -> dict[str, JITFunction]:
    """Every @triton.jit function that a module of the backend defines, kernels and their helpers."""
    return {
        f"{module.__name__}.{name}": value
        for module in modules()
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__
    }


def _type_of(parameter: Any, value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _SPELLING[str(value.dtype).removeprefix("torch.")]
    assert parameter.annotation_type, f"{parameter.name} needs a type: Triton would take a float for float32"
    return str(parameter.annotation_type)


def _note(kernel: JITFunction, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Launch:
    parameters = kernel.params
    options = {k: v for k, v in keywords.items() if k in ("num_warps", "enable_fp_fusion", "maxnreg")}
    values = dict(zip((p.name for p in parameters), arguments, strict=False))
    values |= {k: v for k, v in keywords.items() if k not in options}
    assert set(values) == {p.name for p in parameters}
    constants = {p.name: values[p.name] for p in parameters if p.is_constexpr or values[p.name] is None}
    signature = {}
    for p in parameters:
        signature[p.name] = "constexpr" if p.name in constants else _type_of(p, values[p.name])
        # Otherwise Triton compiles another variant for addresses and numbers that happen to be divisible by 16.
        assert p.name in constants or p.do_not_specialize or p.annotation_type == "fp64", p.name
    return Launch(kernel, signature, constants, options)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Notes the launches of the ops instead of making them. Outputs are left as they are."""
    launches: list[Launch] = []

    def note(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launches.append(_note(self, arguments, keywords))

    with pytest.MonkeyPatch.context() as patch:
        modules()  # before the next line: from then on @triton.jit would make interpreted functions
        patch.setattr(triton.knobs.runtime, "interpret", True)  # CPU tensors are accepted
        patch.setattr(JITFunction, "run", note)
        yield launches


@contextmanager
def settings(long: bool = True, scalars_on_device: bool = False) -> Iterator[None]:
    """Launch as for a long list (chunks of many blocks), and as if steps and rates were on the GPU."""
    tables, adapt_norm = (importlib.import_module(f"{package.__name__}.{m}") for m in ("tables", "adapt_norm"))
    with pytest.MonkeyPatch.context() as patch:
        if long:
            patch.setattr(tables, "_MANY", 0)
        if scalars_on_device:
            patch.setattr(adapt_norm, "_on_host", lambda scalar: False)
        yield


@dataclass(frozen=True)
class Case:
    """One call of an op. `read`, `written`: bytes moved per element, by the docstrings of `sama_kernels/ops`."""

    name: str
    call: Callable[[], object]
    read: int = 0
    written: int = 0
    aligned: bool = True
    long: bool = True
    scalars_on_device: bool = False

    def launches(self) -> list[Launch]:
        with settings(self.long, self.scalars_on_device), recording() as launches:
            self.call()
        return launches


def _tensors(count: int, dtype: torch.dtype, aligned: bool = True) -> list[list[Tensor]]:
    """`count` lists of one tensor, each of which starts at a multiple of 16 bytes, or one element behind one."""
    tensors = randn([(LENGTH + 1,)] * count, dtype)
    return [[x[:LENGTH] if aligned else x[1:]] for x in tensors]


def _adam(
    dtype: torch.dtype, state: torch.dtype, aligned: bool = True, tensor_lr: bool = False, **options: Any
) -> Callable[[], object]:
    def call() -> object:
        case = Adam([(LENGTH,)], dtype, state, **options)
        if not aligned:
            case.v = _tensors(1, dtype, aligned=False)[0]
            return ops.adapt_norm_adam(
                case.v, case.grads, case.exp_avgs, case.exp_avg_sqs, case.maxima, case.params, case.steps,
                **case.scalars, backend="triton",
            )  # fmt: skip
        return case.run("triton", **({"lr": torch.tensor(0.1)} if tensor_lr else {}))

    return call


def _moments(dtype: torch.dtype, state: torch.dtype, variant: Variant, aligned: bool = True) -> Callable[[], object]:
    def call() -> object:
        case = Moments([(LENGTH,)], dtype, state, variant, maximize=variant.decay != 0)
        if not aligned:
            case.v = _tensors(1, dtype, aligned=False)[0]
        return ops.adapt_norm_moments(*case.lists, case.coefficients, **case.scalars, backend="triton")

    return call


def _low_bit(
    dtype: torch.dtype, bits: int, block_size: int = 256, aligned: bool = True, mode: int = ops.EXACT
) -> Callable[[], object]:
    def call() -> object:
        case = LowBit([(LENGTH,)], dtype, bits=bits, block_size=block_size, mode=mode)
        if not aligned:
            case.v = _tensors(1, dtype, aligned=False)[0]
        return ops.adapt_norm_low_bit_adam(*case.lists, **case.options, backend="triton")

    return call


def _scale(dtype: torch.dtype, scale: float = 0.5, lr: Tensor | None = None) -> Callable[[], object]:
    return lambda: ops.adapt_norm_scale(_tensors(1, dtype)[0], scale, lr=lr, backend="triton")


def _perturb(dtype: torch.dtype, side: int, aligned: bool = True, **options: Any) -> Callable[[], object]:
    epsilon = torch.tensor(0.1, dtype=F64)
    return lambda: ops.perturb(*_tensors(2, dtype, aligned), epsilon, side, **options, backend="triton")


def _restore(dtype: torch.dtype) -> Callable[[], object]:
    return lambda: ops.restore(*_tensors(2, dtype), backend="triton")


def _difference(dtype: torch.dtype, minus: torch.dtype, explicit: torch.dtype | None = None) -> Callable[[], object]:
    one = torch.tensor(1.0, dtype=F64)

    def call() -> object:
        extra = [] if explicit is None else _tensors(1, explicit)[0]
        lists = _tensors(1, dtype)[0], _tensors(1, minus)[0]
        return ops.central_difference(*lists, extra, one, one, backend="triton")

    return call


_ALL = {"mode": ops.EXACT, "maximize": True, "amsgrad": True, "weight_decay": 0.1}
_MEASURED = {"rounding": ops.STOCHASTIC, "seed": 3, "measure": True}
_PART = [torch.tensor(1.0, dtype=F64)]

# Every kernel in every storage dtype, with its largest variant (most options, so most registers) in the dtypes of the
# model's parameters and of the optimizer's state that occur together: all float32, all bfloat16, 16-bit parameters with
# float32 state, float64. Without vectors, with short chunks, and with scalars on the device: once each.
CASES = [
    Case("adam float32", _adam(F32, F32), 16, 4),
    Case("adam float32, all options", _adam(F32, F32, **_ALL), 24, 4),
    Case("adam float32, exact", _adam(F32, F32, mode=ops.EXACT), 16, 4, long=False),
    Case("adam float32, scalars on the device", _adam(F32, F32, tensor_lr=True), 16, 4, scalars_on_device=True),
    Case("adam float32, unaligned", _adam(F32, F32, aligned=False), aligned=False),
    Case("adam bfloat16", _adam(BF16, BF16), 8, 2),
    Case("adam bfloat16, unaligned, all options", _adam(BF16, BF16, aligned=False, **_ALL), aligned=False),
    Case("adam bfloat16, float32 state", _adam(BF16, F32), 12, 2),
    Case("adam float16, float32 state, all options", _adam(F16, F32, **_ALL), 18, 2),
    Case("adam float64, all options", _adam(F64, F64, **_ALL), 48, 8, scalars_on_device=True),
    Case("scale float32", _scale(F32), 4, 4),
    Case("scale float32, norm only", _scale(F32, 1.0), 4, 0),
    Case("scale float32, rate on the device", _scale(F32, lr=torch.tensor(0.1)), 4, 4, scalars_on_device=True),
    Case("scale bfloat16", _scale(BF16), 2, 2),
    Case("scale float16", _scale(F16), 2, 2),
    Case("scale float64", _scale(F64), 8, 8),
    Case("linear float32", _moments(F32, F32, Variant(ops.LINEAR)), 4, 4),
    Case("ratio float32", _moments(F32, F32, Variant(ops.RATIO)), 12, 4, long=False),
    Case("ratio float32, firsts", _moments(F32, F32, Variant(ops.RATIO, True)), 16, 4),
    Case("ratio float32, all options", _moments(F32, F32, Variant(ops.RATIO, True, 0.1)), 20, 4),
    Case("ratio bfloat16, all options", _moments(BF16, BF16, Variant(ops.RATIO, True, 0.1)), 10, 2),
    Case("ratio float64, all options", _moments(F64, F64, Variant(ops.RATIO, True, 0.1)), 40, 8),
    Case("centered float32", _moments(F32, F32, Variant(ops.CENTERED, True, 0.1)), 20, 4),
    Case("centered float32, all options", _moments(F32, F32, Variant(ops.CENTERED, True, 0.1, True)), 24, 4),
    Case("centered float16, float32 state", _moments(F16, F32, Variant(ops.CENTERED, True, 0.1, True)), 18, 2),
    Case("centered bfloat16, all options", _moments(BF16, BF16, Variant(ops.CENTERED, True, 0.1, True)), 12, 2),
    Case("centered float64, all options", _moments(F64, F64, Variant(ops.CENTERED, True, 0.1, True)), 48, 8),
    Case("maximum float32", _moments(F32, F32, Variant(ops.MAXIMUM, True)), 16, 4),
    Case("maximum bfloat16, float32 state, all options", _moments(BF16, F32, Variant(ops.MAXIMUM, True, 0.1)), 14, 2),
    Case("maximum float64, all options", _moments(F64, F64, Variant(ops.MAXIMUM, True, 0.1)), 40, 8),
    Case("delta float32", _moments(F32, F32, Variant(ops.DELTA, True)), 16, 4),
    Case("delta float32, all options", _moments(F32, F32, Variant(ops.DELTA, True, 0.1)), 20, 4),
    Case("delta bfloat16, all options", _moments(BF16, BF16, Variant(ops.DELTA, True, 0.1)), 10, 2),
    Case("delta float16, float32 state, all options", _moments(F16, F32, Variant(ops.DELTA, True, 0.1)), 14, 2),
    Case("delta float64, all options", _moments(F64, F64, Variant(ops.DELTA, True, 0.1)), 40, 8),
    Case("delta bfloat16, unaligned", _moments(BF16, BF16, Variant(ops.DELTA, True, 0.1), False), aligned=False),
    Case("ratio bfloat16, unaligned", _moments(BF16, BF16, Variant(ops.RATIO, True, 0.1), False), aligned=False),
    Case("low-bit float32, 8 bits", _low_bit(F32, 8), 8, 4),
    Case("low-bit float32, 8 bits, paper", _low_bit(F32, 8, mode=ops.PAPER), 8, 4, long=False),
    Case("low-bit float32, 8 bits, blocks of 100", _low_bit(F32, 8, 100), 8, 4),
    Case("low-bit float32, 4 bits", _low_bit(F32, 4, 128), 8, 4),
    Case("low-bit float32, 4 bits, blocks of 100", _low_bit(F32, 4, 100), 8, 4),
    Case("low-bit bfloat16, 8 bits", _low_bit(BF16, 8), 4, 2),
    Case("low-bit bfloat16, 4 bits", _low_bit(BF16, 4, 128), 4, 2),
    Case("low-bit float16, 4 bits", _low_bit(F16, 4), 4, 2),
    Case("low-bit float64, 8 bits", _low_bit(F64, 8), 16, 8, scalars_on_device=True),
    Case("low-bit float64, 4 bits, blocks of 99", _low_bit(F64, 4, 99), 16, 8, scalars_on_device=True),
    Case("low-bit float32, 8 bits, unaligned", _low_bit(F32, 8, 100, aligned=False), aligned=False),
    Case("low-bit float64, 4 bits, unaligned", _low_bit(F64, 4, 99, aligned=False), aligned=False),
    Case("low-bit float32, 4 bits, unaligned", _low_bit(F32, 4, 99, aligned=False), aligned=False),
    Case("low-bit bfloat16, 4 bits, unaligned", _low_bit(BF16, 4, aligned=False), aligned=False),
    Case("plus float32", _perturb(F32, ops.PLUS), 8, 8),
    Case("plus float32, measured", _perturb(F32, ops.PLUS, measure=True), 8, 8),
    Case("plus bfloat16", _perturb(BF16, ops.PLUS), 4, 4, long=False),
    Case("plus bfloat16, stochastic", _perturb(BF16, ops.PLUS, rounding=ops.STOCHASTIC), 4, 4),
    Case("plus bfloat16, stochastic, measured", _perturb(BF16, ops.PLUS, **_MEASURED), 4, 4),
    Case("plus bfloat16, stochastic, unaligned", _perturb(BF16, ops.PLUS, False, **_MEASURED), aligned=False),
    Case("plus float16, stochastic, measured", _perturb(F16, ops.PLUS, **_MEASURED), 4, 4),
    Case("plus float64, measured", _perturb(F64, ops.PLUS, measure=True), 16, 16),
    Case("minus float32", _perturb(F32, ops.MINUS), 8, 8),
    Case("minus bfloat16", _perturb(BF16, ops.MINUS), 4, 4),
    Case("minus float16", _perturb(F16, ops.MINUS), 4, 4),
    Case("minus float64", _perturb(F64, ops.MINUS), 16, 16),
    Case("restore float32", _restore(F32), 8, 4),
    Case("restore bfloat16", _restore(BF16), 4, 2),
    Case("restore float16", _restore(F16), 4, 2),
    Case("restore float64", _restore(F64), 16, 8),
    Case("difference float32", _difference(F32, F32), 8, 4),
    Case("difference float32, explicit", _difference(F32, F32, F32), 12, 4),
    Case("difference bfloat16, explicit", _difference(BF16, BF16, BF16), 6, 2),
    Case("difference float16", _difference(F16, F16), 4, 2),
    Case("difference float64, explicit", _difference(F64, F64, F64), 24, 8),
    Case("step size", lambda: ops.step_size(_PART, 0.1, 1e-12, backend="triton")),
]
