"""The exact derivative of dL_base/dlambda along v: one pass at theta in forward mode.

In forward mode every value carries its derivative along v, its tangent, also through a backward pass. So the tangent of
the gradient dL_base/dlambda is what the difference quotients approximate. (The other order, the derivative in lambda of
the loss's tangent, is wrong without a word in torch 2.13 where lambda enters before a batch or layer norm, whose saved
statistics it takes for constants, and fails at a softmax.) The base parameters get their tangents in place, because the
closures hold those very tensors; their values are not changed.

What the base gradient does not flow through carries no tangent: `.detach()` and `.data` drop it by themselves, values
made under `no_grad` and gradients without a graph lose it here. So held values need no tape.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sama_kernels import detach_watch
from sama_kernels.passes import PerturbedPasses
from sama_kernels.types import Closure


@contextmanager
def tangents(params: Sequence[Tensor], v: list[Tensor]) -> Iterator[None]:
    """`params` carry the tangents `v` in this block, in place; afterwards they are what they were.

    The tensors of the list `v` are replaced by the copies of them that the parameters carry, so that at no time there
    are two of all of them.
    """
    versions = tuple(p._version for p in params)
    try:
        with forward_ad.dual_level():  # its end clears every tangent
            for i, p in enumerate(params):
                p.copy_(forward_ad.make_dual(p.detach(), v[i]))  # type: ignore[no-untyped-call]  # theta's own bits
                copy = tangent(p)
                assert copy is not None
                v[i] = copy
            yield
    finally:
        torch._C._autograd._unsafe_set_version_counter(tuple(params), versions)


def tangent(value: Tensor) -> Tensor | None:
    """The derivative of `value` along v; None if it has none."""
    found: Tensor | None = forward_ad.unpack_dual(value).tangent  # type: ignore[no-untyped-call]
    return found


class TangentPass(PerturbedPasses):
    """`at_theta` within `tangents`: L_base(theta), and d/dv of dL_base/dlambda where the other passes have
    dL_base/dlambda; with their random numbers, buffers and (where there is a tape) held values."""

    untaped = staticmethod(torch.detach)

    def at_theta(self) -> tuple[Tensor, list[Tensor | None]]:
        """The only pass."""
        enabled = torch._C._is_fwd_grad_enabled()
        try:
            with uncompiled(), _explained():
                return self._run()
        finally:  # Ctrl-C may have come between two lines of `_NoTangentOfConstants`
            torch._C._set_fwd_grad_enabled(enabled)

    def watch(self, closure: Closure) -> detach_watch.Watch:
        """Plain detaches do no harm in forward mode."""
        return _NoTangentOfConstants(self._base_params)

    def recomputed(self, i: int) -> Callable[[Tensor], Tensor]:
        return torch.detach  # the value at theta, without a tangent: no tape is needed

    def differentiate(self, loss: Tensor) -> list[Tensor | None]:
        """The tangents of dL_base/dlambda; None where lambda is not read."""
        derivatives: list[Tensor | None] = []
        for grad in super().differentiate(loss):
            along_v = None if grad is None else tangent(grad)
            derivatives.append(torch.zeros_like(grad) if grad is not None and along_v is None else along_v)
        return derivatives


class _NoTangentOfConstants(detach_watch.Watch):
    """Values made under `no_grad`, and gradients without a graph, are constants of the base gradient, so they get no
    tangent. And theta, frozen here as in the other passes, says that it requires grad, as when it is trained."""

    def __init__(self, base_params: Sequence[Tensor]) -> None:
        super().__init__()
        self._theta = {*map(id, base_params)}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == detach_watch.ASKS and id(args[0]) in self._theta:
            return True
        if torch.is_grad_enabled():
            result = func(*args, **(kwargs or {}))
            if detach_watch.gives_constants(func, kwargs):
                return tuple(None if x is None else x.detach() for x in result)
            if func == detach_watch.READS_GRAD and result is not None and not result.requires_grad:
                return result.detach() if tangent(result) is not None else result
            return result
        with forward_ad._set_fwd_grad_enabled(True):  # it is off inside autograd.Functions
            reads_theta = any(tangent(x) is not None for x in detach_watch.tensors_in((args, kwargs)))
        if reads_theta:
            _refuse_hidden_input()
        with forward_ad._set_fwd_grad_enabled(False):
            return func(*args, **(kwargs or {}))


def _refuse_hidden_input() -> None:
    """Raise if an autograd.Function without jvp is running: that is no_grad too, but if it reads theta otherwise than
    as an argument (reentrant checkpointing does), torch would not notice that a tangent is lost."""
    owner = detach_watch.running_function()
    if owner is not None and owner.jvp is torch.autograd.Function.jvp:
        raise _unsupported(f"the autograd.Function {owner.__name__}, which has no jvp")


def uncompiled() -> AbstractContextManager[object]:
    """Let what torch.compile made run eagerly: some of its code loses tangents without an error."""
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds, and without it nothing is compiled
        return nullcontext()
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager


@contextmanager
def _explained() -> Iterator[None]:
    """torch's errors about forward mode as one that names the operator and the cure."""
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        operator = re.search(r"forward AD with (\S+) that does not support it", str(error))
        if operator is not None:
            raise _unsupported(f"the operator {operator[1]}") from error
        if "must implement the jvp function" in str(error):
            raise _unsupported(f"the autograd.Function {_failed_function(error)}, which has no jvp") from error
        raise


def _failed_function(error: BaseException) -> str:
    """The name of the autograd.Function whose jvp is missing: torch's message leaves it out."""
    trace, name = error.__traceback__, "(unknown)"
    while trace is not None:
        node = trace.tb_frame.f_locals.get("self")  # in the frame of its `apply_jvp`
        name = getattr(getattr(node, "_forward_cls", None), "__name__", name)
        trace = trace.tb_next
    return name


def _unsupported(what: str) -> NotImplementedError:
    return NotImplementedError(
        f'difference: "exact" needs forward-mode derivatives of base_loss, and torch has none for {what}; use'
        ' difference="central", or if this is fused attention, unfused attention (attn_implementation="eager" in'
        " transformers, or torch.nn.attention.sdpa_kernel(SDPBackend.MATH))"
    )
