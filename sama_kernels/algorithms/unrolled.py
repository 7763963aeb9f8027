"""One step of the real base optimizer as a differentiable function, and reverse mode through several of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sama_kernels import held_values as holding
from sama_kernels import loss_checks, mask_draws
from sama_kernels.adaptation import step_record
from sama_kernels.algorithms import adam_step, torch_step
from sama_kernels.algorithms.options import Iterative
from sama_kernels.algorithms.second_derivatives import check_gradient, check_loss, explained
from sama_kernels.algorithms.substitution import nowhere, places, substituted
from sama_kernels.algorithms.torch_step import State
from sama_kernels.buffers import BufferGuard
from sama_kernels.guards import Interrupts, RngState
from sama_kernels.hooks import Hooks, hooked
from sama_kernels.types import Closure, Problem


@dataclass
class Unrolled:
    """The meta loss after some steps, 0-dim, its gradients with respect to lambda, and the first step's base loss."""

    loss: Tensor
    grads: list[Tensor | None]
    base_loss: Tensor


@dataclass
class End:
    """What the steps led to: theta and the optimizer's state, detached, the generators, and what brings the buffers."""

    theta: list[Tensor]
    state: State
    rng: RngState
    bring_buffers: Callable[[], None]


class Unroll:
    """Steps theta <- theta - u(g) from where theta and the optimizer's state are; `run` changes neither."""

    def __init__(
        self, problem: Problem, options: Iterative, hooks: Hooks,
        rng: RngState, buffers: BufferGuard, interrupts: Interrupts,
    ) -> None:  # fmt: skip
        self._buffers, self._rng = buffers, rng
        self._end: End | None = None
        self._problem, self._options, self._interrupts = problem, options, interrupts
        assert problem.optimizer is not None  # checks.held_by
        self._optimizer: Optimizer = problem.optimizer
        torch_step.check(self._optimizer)
        losses = problem.base_losses
        if options.per_step and len(losses) != options.steps:
            raise ValueError(
                f"base_loss: {len(losses)} closures for {options.steps} steps; per_step=True wants one for each step"
            )
        self._gate = Gate()
        self._hooks = hooks
        self._places = places(problem.reached, problem.base_params)

    def run(self) -> Unrolled:
        """All steps, the meta loss after them, and back."""
        with holding.recomputing(self._gate.hold):  # where a checkpointed model computes activations again
            result = self._checkpointed() if self._options.checkpoint else self._one_graph()
        if all(g is None for g in result.grads):
            raise ValueError("meta_params: neither base_loss nor meta_loss reads any of them (all gradients are None)")
        return result

    def advance(self) -> None:
        """All <- what the steps led to, in the tensors that hold it; after `run`, and after the guards' own end."""
        assert self._end is not None
        torch.clear_autocast_cache()  # it holds theta as it was
        self._end.rng.restore()
        self._end.bring_buffers()
        for p, x, new in zip(self._problem.base_params, self._end.theta, self._end.state, strict=True):
            p.copy_(x)
            state = self._optimizer.state[p]
            for key, value in new.items():
                if isinstance(value, Tensor) and isinstance(state.get(key), Tensor):
                    state[key].copy_(value)
                elif key in torch_step.SCALARS and isinstance(value, Tensor):  # torch's own first step makes it so
                    state[key] = value.to(torch.promote_types(torch.get_default_dtype(), torch.float32), copy=True)
                else:
                    state[key] = value
        step_record.advanced(self._optimizer, self._options.steps)

    def _one_graph(self) -> Unrolled:
        problem = self._problem
        with torch.enable_grad():
            theta, state = list(problem.base_params), self._state()
            base_loss: Tensor | None = None
            for step in range(self._options.steps):
                theta, state, loss = self._step(step, theta, state)
                base_loss = loss if base_loss is None else base_loss
            self._note_end(theta, state)
            meta_loss = self._at("meta_loss", theta, [problem.meta_loss])
            self._rng.follow()
            with nowhere(self._places, len(theta)), self._interrupts.allowed():
                grads = torch.autograd.grad(meta_loss, problem.meta_params, allow_unused=True)
        assert base_loss is not None
        return Unrolled(meta_loss.detach(), list(grads), base_loss)

    def _checkpointed(self) -> Unrolled:
        """Forward without graphs, keeping what each step began with; then each step again, from the last, with one."""
        problem, lam = self._problem, self._problem.meta_params
        kept: list[tuple[list[Tensor], State, RngState, Callable[[], None]]] = []
        theta, state = [p.detach() for p in problem.base_params], self._state()
        losses = []
        for step in range(self._options.steps):
            kept.append((theta, state, self._rng.now(), self._buffers.moved()))
            with torch.enable_grad():
                theta, state, loss = self._step(step, _leaves(theta), state)
            theta, state = [x.detach() for x in theta], [_detached(s) for s in state]
            losses.append(loss)
        self._note_end(theta, state)
        theta = _leaves(theta)
        with torch.enable_grad(), substituted(self._places, theta), self._interrupts.allowed():
            meta_loss = self._at("meta_loss", theta, [problem.meta_loss])
            self._rng.follow()
            found = torch.autograd.grad(meta_loss, [*theta, *lam], allow_unused=True)
        adjoint: list[Tensor | None] = list(found[: len(theta)])
        sums: list[Tensor | None] = list(found[len(theta) :])
        state_adjoint: list[Tensor | None] = [None] * len(_floats(state))
        for step in reversed(range(self._options.steps)):
            theta, state, rng, bring_buffers = kept.pop()
            rng.restore()
            bring_buffers()
            with torch.enable_grad(), self._interrupts.allowed():
                theta, state = _leaves(theta), [_with_leaves(s) for s in state]
                carried = _floats(state)
                after, after_state, _ = self._step(step, theta, state)
                outputs = [*after, *_floats(after_state)]
                pairs = [
                    (y, a) for y, a in zip(outputs, [*adjoint, *state_adjoint], strict=True)
                    if a is not None and y.requires_grad
                ]  # fmt: skip
                with substituted(self._places, theta):
                    found = torch.autograd.grad(
                        [y for y, _ in pairs], [*theta, *carried, *lam], [a for _, a in pairs], allow_unused=True
                    )
            adjoint, state_adjoint = list(found[: len(theta)]), list(found[len(theta) : len(theta) + len(carried)])
            own = found[len(theta) + len(carried) :]
            sums = [a if b is None else b if a is None else a + b for a, b in zip(sums, own, strict=True)]
        return Unrolled(meta_loss.detach(), sums, losses[0])

    def _note_end(self, theta: Sequence[Tensor], state: State) -> None:
        if self._options.advance:
            after = [x.detach() for x in theta], [_detached(s) for s in state]
            self._end = End(*after, RngState(), self._buffers.moved())

    def _step(self, step: int, theta: Sequence[Tensor], state: State) -> tuple[list[Tensor], State, Tensor]:
        """theta and the state after one step, with their graph, and L_base before it."""
        losses = self._problem.base_losses
        with holding.handling(self._gate.hold):
            loss = self._at("base_loss", theta, losses[step : step + 1] if self._options.per_step else losses)
        with substituted(self._places, theta), self._interrupts.allowed(), self._gate.closed(), explained():
            found = torch.autograd.grad(loss, theta, create_graph=True, allow_unused=True)
        check_gradient(found, until=theta)
        with torch.enable_grad(), self._interrupts.allowed():
            grads = [hooked(hooks, g) for hooks, g in zip(self._hooks, found, strict=True)]
        if adam_step.fits(self._optimizer, state):
            moved, after = adam_step.step(self._optimizer, self._problem.base_params, theta, grads, state)
        else:
            moved, after = torch_step.step(self._optimizer, self._problem.base_params, theta, grads, state)
        return moved, after, loss.detach()

    def _at(self, name: str, theta: Sequence[Tensor], losses: Sequence[Closure]) -> Tensor:
        """The sum of the losses with `theta` in the place of the base parameters."""
        values = []
        with substituted(self._places, theta):
            for loss in losses:
                with mask_draws.fast(loss, theta[0].device), self._interrupts.allowed():
                    value = loss()
                    loss_checks.scalar_loss(name, value, "base_params")
                    check_loss(name, value, theta, self._problem.base_params)
                    values.append(value.reshape(()))
        return torch.stack(values).sum()

    def _state(self) -> State:
        return [_detached(self._optimizer.state.get(p, {})) for p in self._problem.base_params]


class Gate:
    """What `stop_gradient` does in a step: the base gradient does not flow through, the derivative of the step does.

    A held value is a constant of the step's gradient g, but it depends on theta, and hence on lambda through the steps
    before. A plain `.detach()` loses that.
    """

    def __init__(self) -> None:
        self.is_open = True

    def hold(self, x: Tensor) -> Tensor:
        """The handler for `stop_gradient`."""
        held: Tensor = _Held.apply(x, self)  # type: ignore[no-untyped-call]
        return held

    @contextmanager
    def closed(self) -> Iterator[None]:
        """While g is made."""
        self.is_open = False
        try:
            yield
        finally:
            self.is_open = True


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Gate) -> Tensor:
        ctx.gate = gate
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return (grads[0] if ctx.gate.is_open else None), None


def _leaves(theta: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in theta]


def _detached(state: dict[str, Any]) -> dict[str, Any]:
    return {key: x.detach() if isinstance(x, Tensor) else x for key, x in state.items()}


def _with_leaves(state: dict[str, Any]) -> dict[str, Any]:
    return {key: x.detach().requires_grad_() if _is_carried(key, x) else x for key, x in state.items()}


def _floats(state: State) -> list[Tensor]:
    """What a step carries to the next one, besides theta."""
    return [x for s in state for key, x in s.items() if _is_carried(key, x)]


def _is_carried(key: str, x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and key != "step"
