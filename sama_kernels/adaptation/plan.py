"""What an optimizer family hands over: which op call adapts which parameters, decided before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sama_kernels.adaptation import step_record
from sama_kernels.distributed.sharded import locals_of, placed_as


@dataclass
class OpCall:
    """One call of an `adapt_norm` op for the parameters of one group that share their hyperparameters.

    Attributes:
        op: called as op(v, *lists, **options, backend=...), returns ||v||^2.
        rows: positions of the parameters among the base parameters.
        lists: per list argument of the op the tensors (or states) of these rows (empty: the op does not need it).
        options: the other arguments.
        coefficients: numbers of each tensor, one row each, the argument behind the lists; None if the op has none.
    """

    op: Callable[..., Tensor]
    rows: list[int] = field(default_factory=list)
    lists: tuple[list[Any], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    coefficients: Tensor | None = None


@dataclass(frozen=True)
class GroupStep:
    """The parameters of one group that took part in the last step, and the hyperparameters of that step.

    `name` is that of the argument which the parameters come from, for errors.
    """

    optimizer: Optimizer
    rows: list[int]
    params: list[Tensor]
    hyper: dict[str, Any]
    mode: int
    name: str = "base_params"

    def with_state(self, key: str) -> tuple[list[int], list[dict[str, Any]]]:
        """Which of `params` have `key` in their state (the others were never updated), and their states."""
        states = [self.optimizer.state.get(p, {}) for p in self.params]
        used = [i for i, state in enumerate(states) if key in state]
        return used, [states[i] for i in used]

    def coupled_decay(self) -> float:
        """The weight decay that is part of the gradient; decoupled decay does not enter D.

        With it D takes theta before the step, solved from what theta is now: it warns if theta was written since.
        """
        decoupled = self.hyper.get("decoupled_weight_decay", False)
        decay = 0.0 if decoupled else float(self.hyper["weight_decay"])
        if decay != 0.0 and step_record.has_moved(self.optimizer, self.params):
            warnings.warn(
                f"{self.name}: they were written after the optimizer's last step (clamped, or moved by update_base),"
                " but D with coupled weight decay is found from theta as that step left it; call meta_grad right after"
                " optimizer.step(), or use decoupled weight decay (AdamW)",
                stacklevel=2,
            )
        return decay

    def gradient(self, i: int) -> Tensor:
        """The gradient of the step, still in `.grad`."""
        return gradient_of_step(self.params[i], self.hyper, self.name, self.rows[i])

    def gradients(self, used: Sequence[int]) -> list[Tensor]:
        """Those of several of the parameters; in the usual case, plain tensors that nobody has changed, quicker."""
        params = [self.params[i] for i in used]
        grads = [p.grad for p in params]
        if step_record.all_unchanged(self.hyper, params, grads):
            plain = [g for g in grads if type(g) is Tensor and g.layout == torch.strided]
            if len(plain) == len(params):
                return plain
        return [self.gradient(i) for i in used]


def gradient_of_step(p: Tensor, hyper: dict[str, Any], name: str, row: int) -> Tensor:
    """The gradient that the last step was made with (`hyper` is its record), still in `.grad`.

    Raises:
        ValueError: it is gone, or another one stands there. TypeError: it is sparse.
    """
    grad = p.grad
    if grad is None:
        raise ValueError(
            f"{name}: tensor {row} (shape {tuple(p.shape)}) has no .grad, which the"
            " adaptation needs; call meta_grad after optimizer.step() and before zero_grad()"
        )
    if grad.is_sparse:
        raise TypeError(f"{name}: tensor {row} has a sparse .grad; build the embedding with sparse=False")
    if not step_record.unchanged(hyper, p):
        raise ValueError(
            f"{name}: the .grad of tensor {row} (shape {tuple(p.shape)}) was changed or replaced after the optimizer's"
            " last step, so it is not the gradient of that step, which the adaptation needs; call meta_grad right after"
            " optimizer.step(), before another backward() or zero_grad(). Where a GradScaler may have skipped the"
            " step, pass grad_scaler="
        )
    return placed_as(grad, p)


Family = Callable[[GroupStep], list[OpCall]]
"""An optimizer family: what happened to the parameters of one group -> the calls that adapt them."""


def apply(plan: Sequence[OpCall], v: list[Tensor | None], backend: str) -> list[Tensor]:
    """Run the plan: v <- D d in place. Entries without a direct gradient stay None, and entries that no call covers
    become None: the optimizer has not moved those parameters, so D = 0 for them. Of DTensors `v` has this rank's part.

    Returns: ||v||^2 of each call, 0-dim.
    """
    norm_sqs: list[Tensor] = []
    device = next(x.device for x in v if x is not None)
    adapted: list[Tensor | None] = [None] * len(v)
    for call in plan:
        used = [k for k, row in enumerate(call.rows) if v[row] is not None]
        if not used:
            continue
        for k in used:
            adapted[call.rows[k]] = v[call.rows[k]]
        lists = [locals_of(entries[k] for k in used) if entries else [] for entries in call.lists]
        numbers = [] if call.coefficients is None else [_rows(call.coefficients, used)]
        norm_sqs.append(call.op([v[call.rows[k]] for k in used], *lists, *numbers, **call.options, backend=backend))
    v[:] = adapted
    if not norm_sqs:  # the meta loss reads nothing that the optimizer moved
        norm_sqs.append(torch.zeros((), dtype=torch.float64, device=device))
    return norm_sqs


def _rows(coefficients: Tensor, used: list[int]) -> Tensor:
    """Not by indexing with a list, for which torch would copy it to the device."""
    return coefficients if len(used) == len(coefficients) else torch.stack([coefficients[k] for k in used])
