"""One step of the real base optimizer as a differentiable function, and reverse mode through several of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sama_kernels import held_values as holding
from sama_kernels import loss_checks, mask_draws
from sama_kernels.algorithms import adam_step
from sama_kernels.algorithms.options import Iterative
from sama_kernels.algorithms.substitution import nowhere, places, substituted
from sama_kernels.buffers import BufferGuard
from sama_kernels.guards import Interrupts, RngState
from sama_kernels.types import Closure, Problem

State = list[dict[str, Any]]
"""The optimizer's state, one dict per base parameter."""


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
        self, problem: Problem, options: Iterative, rng: RngState, buffers: BufferGuard, interrupts: Interrupts
    ) -> None:
        self._buffers, self._rng = buffers, rng
        self._end: End | None = None
        self._problem, self._options, self._interrupts = problem, options, interrupts
        assert problem.optimizer is not None  # checks.held_by
        self._optimizer: Optimizer = problem.optimizer
        if "differentiable" not in self._optimizer.defaults:
            raise NotImplementedError(
                f"algorithm: Iterative differentiates the optimizer's step, and {type(self._optimizer).__name__} has"
                ' no option `differentiable`; use "truncated", or SGD, Adam, AdamW or another optimizer of torch.optim'
            )
        losses = problem.base_losses
        if options.per_step and len(losses) != options.steps:
            raise ValueError(
                f"base_loss: {len(losses)} closures for {options.steps} steps; per_step=True wants one for each step"
            )
        self._gate = Gate()
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
        self._end.rng.restore()
        self._end.bring_buffers()
        for p, x, new in zip(self._problem.base_params, self._end.theta, self._end.state, strict=True):
            p.copy_(x)
            state = self._optimizer.state[p]
            for key, value in new.items():
                if isinstance(value, Tensor) and isinstance(state.get(key), Tensor):
                    state[key].copy_(value)
                elif key in _SCALARS and isinstance(value, Tensor):  # torch's own first step makes it so
                    state[key] = value.to(torch.promote_types(torch.get_default_dtype(), torch.float32), copy=True)
                else:
                    state[key] = value

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
        with substituted(self._places, theta), self._interrupts.allowed(), self._gate.closed():
            grads = torch.autograd.grad(loss, theta, create_graph=True, allow_unused=True)
        if adam_step.fits(self._optimizer, state):
            moved, after = adam_step.step(self._optimizer, self._problem.base_params, theta, grads, state)
        else:
            moved, after = self._step_by_torch(theta, grads, state)
        return moved, after, loss.detach()

    def _step_by_torch(
        self, theta: Sequence[Tensor], grads: Sequence[Tensor | None], state: State
    ) -> tuple[list[Tensor], State]:
        """The optimizer's own step, differentiated by autograd."""
        # It works in place, and what it overwrites is part of the graph.
        moved = [x.clone() for x in theta]
        optimizer = self._copy_of_optimizer(moved)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            for x, g, s in zip(moved, grads, state, strict=True):
                x.grad = g
                if s:
                    optimizer.state[x] = {key: _copied(key, v) for key, v in s.items()}
            _start_momentum(optimizer)
            optimizer.step()
            for x in moved:
                x.grad = None
        return moved, [dict(optimizer.state.get(x, {})) for x in moved]

    def _copy_of_optimizer(self, theta: Sequence[Tensor]) -> Any:
        of = {id(p): x for p, x in zip(self._problem.base_params, theta, strict=True)}
        groups = [
            {**group, "params": [of[id(p)] for p in group["params"] if id(p) in of], **_DIFFERENTIABLE}
            for group in self._optimizer.param_groups
        ]
        make: Any = type(self._optimizer)
        return make([g for g in groups if g["params"]], differentiable=True)

    def _at(self, name: str, theta: Sequence[Tensor], losses: Sequence[Closure]) -> Tensor:
        """The sum of the losses with `theta` in the place of the base parameters."""
        values = []
        with substituted(self._places, theta):
            for loss in losses:
                with mask_draws.fast(loss, theta[0].device), self._interrupts.allowed():
                    value = loss()
                    loss_checks.scalar_loss(name, value, "base_params")
                    values.append(value.reshape(()))
        return torch.stack(values).sum()

    def _state(self) -> State:
        return [_detached(self._optimizer.state.get(p, {})) for p in self._problem.base_params]


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give SGD the momentum buffers of before its first step with which the update b <- momentum b + (1 - dampening) g
    makes b = g, as that step does. torch makes the first b by `detach`, and the derivative is lost."""
    if type(optimizer) is not torch.optim.SGD:
        return
    for group in optimizer.param_groups:
        for x in group["params"] if group["momentum"] else ():
            if x.grad is not None and optimizer.state[x].get("momentum_buffer") is None:
                g = (-x.grad if group["maximize"] else x.grad) + group["weight_decay"] * x
                optimizer.state[x]["momentum_buffer"] = group["dampening"] / group["momentum"] * g


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


_DIFFERENTIABLE = {"differentiable": True, "foreach": False, "fused": False, "capturable": False}


_SCALARS = ("step", "mu_product", "eta", "mu")


def _copied(key: str, x: Any) -> Any:
    """torch keeps these scalars in float32, and a differentiable step, unlike others, reckons in their dtype: the bias
    correction 1 - 0.999^t would have 5 digits."""
    if not isinstance(x, Tensor):
        return x
    return x.to(torch.float64, copy=True) if key in _SCALARS else x.clone()


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
