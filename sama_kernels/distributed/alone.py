"""A meta step of one process: what `exchange.Exchange` does over several, done at once and alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

from torch import Tensor

from sama_kernels.distributed.agreement import Verdict
from sama_kernels.distributed.fsdp import leave_passes
from sama_kernels.ownership import own
from sama_kernels.types import Problem

Adapt = Callable[[list[Tensor | None]], list[Tensor]]
"""v <- D d in place, for the entries that are there; returns the parts of ||v||^2."""
Form = Callable[[Sequence[int], list[Tensor | None], Sequence[Tensor | None]], list[Tensor]]
"""(rows, first, last): this rank's meta gradient of these rows, in the memory of `first` where that is there."""
Share = float | Tensor


class Alone:
    """One process, which has nothing to exchange.

    Attributes:
        adapt: set before the passes: what turns d into v.
        base_factor, meta_factor: what the losses are multiplied by before they are differentiated, where it is not us
            who average gradients (`fully_shard` does, over ranks that all count the same).
        taken: the gradients of the last pass, summed over microbatches; None if they are left to the caller.
    """

    adapt: Adapt
    base_factor: Share = 1.0
    meta_factor: Share = 1.0
    taken: list[Tensor | None] | None = None

    def __init__(self, problem: Problem) -> None:
        self._params = problem.base_params
        self._fsdp = problem.fsdp
        self._averaged = [id(p) in problem.owned for p in problem.base_params]
        self._first: list[Tensor | None] = []
        self._form: Form | None = None

    def shares_of(self, row: int) -> tuple[Share, Share]:
        """What this rank's gradients of the base and the meta loss count for in the meta gradient of a row."""
        return 1.0, 1.0

    def meta_backward(self) -> AbstractContextManager[object]:
        """Around the backward pass of the meta loss."""
        return nullcontext()

    def adapted(self, d: list[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor]]:
        """v = D d, in memory that is nobody else's, and the parts of ||v||^2; `d` as autograd returned it."""
        v = own(d, self._params, {row for row, averaged in enumerate(self._averaged) if averaged})
        d.clear()  # the caller of this one wants the only references
        return v, self.adapt(v)

    def begin_last_pass(self, first: Sequence[Tensor | None], form: Form) -> None:
        """Before the last pass: the gradients of the pass before it, and what makes a meta gradient of both."""
        self._first, self._form = list(first), form

    def last_backward(
        self, params: Sequence[Tensor], before: Sequence[Tensor | None]
    ) -> AbstractContextManager[object]:
        """Around the backward pass of the last microbatch, `before` being the sums over the others."""
        return nullcontext()

    def meta_gradient(self, last: Sequence[Tensor | None]) -> list[Tensor]:
        """The meta gradient, made of the gradients of the last pass."""
        assert self._form is not None
        return self._form(range(len(last)), self._first, last)

    def conclude(
        self, losses: Sequence[Tensor], degenerate: Tensor, norm: Tensor, bad: Tensor | None
    ) -> Verdict | None:
        """How the step went elsewhere; None if there is nobody else."""
        return None

    def __enter__(self) -> Alone:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            leave_passes(self._fsdp)
        # `adapt`, the form and the reductions refer to one another, and hold gradients and buckets of theta's size.
        # They are to go now, not when Python next looks for cycles: a small transformer had five sets of them by then.
        vars(self).clear()
