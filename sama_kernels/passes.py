"""The three first-order passes of a meta step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from sama_kernels import detach_watch, loss_checks, mask_draws
from sama_kernels import held_values as holding
from sama_kernels.buffers import BufferGuard
from sama_kernels.distributed import Alone, sharded
from sama_kernels.guards import Interrupts, RngState, no_fast_attention
from sama_kernels.ownership import own
from sama_kernels.perturbation import Perturbation
from sama_kernels.types import Closure, Problem
from sama_kernels.written import Unwritten, parameters_besides


@dataclass
class MetaPass:
    """Pass 1. The gradients are those of `Problem.scaled`, as autograd returned them.

    Attributes:
        loss: L_meta(theta), 0-dim.
        d: dL_meta/dtheta, one per base parameter; None where the loss does not read it.
        explicit: dL_meta/dlambda, likewise.
    """

    loss: Tensor
    d: list[Tensor | None]
    explicit: list[Tensor | None]


def direct_gradient(problem: Problem, ranks: Alone, interrupts: Interrupts) -> MetaPass:
    """Pass 1; `.grad` is not touched."""
    n = len(problem.base_params)
    drawing = mask_draws.fast(problem.meta_loss, problem.base_params[0].device)
    unwritten = Unwritten(problem.base_params).during("meta_loss")
    with torch.enable_grad(), drawing, unwritten, interrupts.allowed():
        loss = problem.meta_loss()
    loss_checks.scalar_loss("meta_loss", loss, "base_params")
    with torch.enable_grad(), interrupts.allowed():
        inputs = (*problem.base_params, *problem.meta_params)
        with ranks.meta_backward():
            grads = sharded.gradients(problem.scaled(loss, ranks.meta_factor), inputs, problem.owned)
        loss_checks.whole_graph("meta_loss", loss, grads[:n])
        loss = loss.detach().reshape(())
    d: list[Tensor | None] = list(grads[:n])
    explicit: list[Tensor | None] = list(grads[n:])
    if all(g is None for g in d):
        raise ValueError("meta_loss: it does not read any base parameter; compute it with base_params")
    loss_checks.dense("base_params", d)
    return MetaPass(loss, d, explicit)


def buffer_guard(problem: Problem) -> BufferGuard:
    """The guard of this meta step."""
    first = any(map(detach_watch.is_new, problem.base_losses))
    return BufferGuard(problem.reached, problem.base_params, compiled=problem.compiled, first=first)


class PerturbedPasses:
    """Passes 2 and 3: L_base(theta+-) and dL_base(theta+-)/dlambda, both of the same function.

    The same random numbers, the same buffers, the same held values (`stop_gradient`). theta is frozen by the caller
    and lambda alone is differentiated, so no activation of the base model is stored.
    """

    untaped: Callable[[Tensor], Tensor] = staticmethod(holding.refuse)
    """What `stop_gradient` does in a pass without a tape."""

    def __init__(
        self, problem: Problem, ranks: Alone, buffers: BufferGuard, rng: RngState, interrupts: Interrupts
    ) -> None:
        self._ranks = ranks
        self._losses = problem.base_losses
        self._scaled = problem.scaled
        self._owned = problem.owned
        self._compiled = problem.compiled
        self._base_params = problem.base_params
        self._meta_params = problem.meta_params
        others = parameters_besides(problem.reached, problem.base_params, problem.meta_params)
        self._unwritten = Unwritten(problem.base_params, others)
        self._buffers = buffers
        self._rng = rng
        self._interrupts = interrupts
        self._averaged = frozenset(i for i, p in enumerate(problem.meta_params) if id(p) in problem.owned)
        self._tapes: list[holding.Tape] | None = None
        if problem.hold == "auto":
            tapes = [holding.tape_of(loss, problem.generators) for loss in self._losses]
            self._tapes = [t for t in tapes if t is not None] if None not in tapes else None

    def at_plus(self, theta: Perturbation) -> tuple[Tensor, list[Tensor | None]]:
        """Pass 2, at theta+. If it asks for values at theta and no tape has them, theta goes back for them once."""
        if self._tapes is None and any(map(holding.is_known_to_ask, self._losses)):
            self._visit_centre(theta)
        try:
            result = self._run()
        except holding.NeedsCentre:
            self._visit_centre(theta)
            result = self._run()
        if self._compiled:
            self._watch_uncompiled()
        return result

    def at_theta(self) -> tuple[Tensor, list[Tensor | None]]:
        """Pass 2 of a forward difference. Without a tape it makes the one that the next pass replays."""
        tapes = [holding.Tape(copy=True) for _ in self._losses] if self._tapes is None else None
        result = self._run(tapes)
        if tapes is not None:
            self._tapes = tapes
        if self._compiled:
            self._watch_uncompiled()
        return result

    def at_other_side(self) -> tuple[Tensor, list[Tensor | None]]:
        """Pass 3: at theta-, or in a forward difference at theta+; other ranks get its gradients as they appear."""
        return self._run(sent=True)

    def _visit_centre(self, theta: Perturbation) -> None:
        """Evaluate the losses at theta, to learn the values that `stop_gradient` holds. With gradients on, as a loss
        may need those of its inputs; theta is frozen, so the graph is lambda's, and goes at once."""
        theta.toggle()
        self._rewind_randomness()
        tapes = []
        for loss in self._losses:
            tape = holding.Tape(copy=True)
            answers, explained = holding.handling(tape.record), loss_checks.inner_gradients()
            with torch.enable_grad(), self._as_trained(loss), answers, self._interrupts.allowed(), explained:
                loss()
            holding.remember(loss)
            tapes.append(tape)
        self._tapes = tapes
        theta.toggle()

    def _run(
        self, record: list[holding.Tape] | None = None, *, sent: bool = False
    ) -> tuple[Tensor, list[Tensor | None]]:
        """One pass over all microbatches; held values are replayed, or written to `record`."""
        self._rewind_randomness()
        total: Tensor | None = None
        sums: list[Tensor | None] = [None] * len(self._meta_params)
        for i in range(len(self._losses)):
            last = sent and i == len(self._losses) - 1
            backward = self._ranks.last_backward(self._meta_params, sums) if last else nullcontext()
            loss, grads = self._evaluate(i, None if record is None else record[i].record, backward)
            total = loss if total is None else total + loss
            if last and self._ranks.taken is not None:
                sums = self._ranks.taken
                break
            own_grads = own(grads, self._meta_params, self._averaged)
            if len(self._losses) > 1:  # bfloat16 and float16 gradients are added, and later differenced, in float32
                own_grads = [g.float() if g is not None and g.element_size() == 2 else g for g in own_grads]
            sums = [g if s is None else s if g is None else s.add_(g) for s, g in zip(sums, own_grads, strict=True)]
        if all(s is None for s in sums):
            raise ValueError("meta_params: base_loss does not read any of them (all gradients are None)")
        assert total is not None
        return total, sums

    def _evaluate(
        self, i: int, record: Callable[[Tensor], Tensor] | None, backward: AbstractContextManager[object]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """One microbatch: the loss and, within `backward`, its gradient with respect to lambda (`differentiate`)."""
        closure = self._losses[i]
        watch = self.watch(closure)
        with holding.recomputing(self.recomputed(i) if record is None else torch.detach), no_fast_attention():
            loss = self._loss(i, watch or nullcontext(), record)
            loss_checks.scalar_loss("base_loss", loss, "meta_params")
            if watch is not None:
                watch.report(closure)
            with self._interrupts.allowed(), backward:
                grads = self.differentiate(self._scaled(loss, self._ranks.base_factor))
                loss_checks.whole_graph("base_loss", loss, grads)
        loss_checks.dense("meta_params", grads)
        return loss.detach().reshape(()), grads

    def watch(self, closure: Closure) -> detach_watch.Watch | None:
        """Looks for plain detaches while the closure runs; once for each closure's code."""
        watched = not self._compiled and detach_watch.is_new(closure)
        return detach_watch.DetachWatch(self._base_params) if watched else None

    def recomputed(self, i: int) -> Callable[[Tensor], Tensor]:
        """What `stop_gradient` does where backward computes activations again (checkpointing)."""
        return torch.detach if self._tapes is None else self._tapes[i].recall

    def differentiate(self, loss: Tensor) -> list[Tensor | None]:
        """Of one microbatch: the gradient of the scaled loss with respect to lambda."""
        return sharded.gradients(loss, self._meta_params, self._owned)

    def _loss(
        self, i: int, context: AbstractContextManager[object], record: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """L_base of one microbatch at today's theta, with its held values."""
        tape = self._tapes[i] if self._tapes is not None else None
        if tape is not None:
            tape.rewind()
            if tape.rng is not None:  # the dropout masks of the call whose values are held
                tape.rng.restore()
        handler = record or (self.untaped if tape is None else tape.replay)
        closure = self._losses[i]
        answers, explained = holding.handling(handler), loss_checks.inner_gradients()
        with torch.enable_grad(), self._as_trained(closure), answers, context, self._interrupts.allowed(), explained:
            loss = closure()
        if tape is not None:
            tape.check_used_up()
        return loss

    def _watch_uncompiled(self) -> None:
        """Look for detached values in one more evaluation, without torch.compile: compiled code hides them, and would
        be compiled again for the watch's mode. A pass itself must not do without torch.compile, which may draw other
        random numbers than eager code."""
        self._rewind_randomness()
        for i, closure in enumerate(self._losses):
            if detach_watch.is_new(closure):
                watch = detach_watch.DetachWatch(self._base_params)
                with torch.compiler.set_stance("force_eager"):
                    self._loss(i, watch)
                watch.report(closure)

    @contextmanager
    def _as_trained(self, loss: Closure) -> Iterator[None]:
        """Dropout masks drawn fast, attention as in training, and an error from a loss that writes parameters."""
        masks = mask_draws.fast(loss, self._base_params[0].device)
        with masks, no_fast_attention(), self._unwritten.during("base_loss"):
            yield

    def _rewind_randomness(self) -> None:
        """All generators to where the passes begin; unless a tape will bring each of them to where its call began."""
        held = [] if self._tapes is None else [tape.rng for tape in self._tapes]
        if not held or not all(rng is not None and rng.covers(self._rng) for rng in held):
            self._rng.restore()
        self._buffers.restore()
