"""What an optimizer family hands over: which op call adapts which parameters, decided before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass
class OpCall:
    """One call of an `adapt_norm` op for the parameters of one group that share their hyperparameters.

    Attributes:
        op: called as op(v, *lists, **options, backend=...), returns ||v||^2.
        rows: positions of the parameters among the base parameters.
        lists: per list argument of the op the tensors of these rows (empty: the op does not need this list).
        options: the other arguments.
        coefficients: numbers of each tensor, one row each, the argument behind the lists; None if the op has none.
    """

    op: Callable[..., Tensor]
    rows: list[int] = field(default_factory=list)
    lists: tuple[list[Tensor], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    coefficients: Tensor | None = None


@dataclass(frozen=True)
class GroupStep:
    """The parameters of one group that took part in the last step, and the hyperparameters of that step."""

    optimizer: Optimizer
    rows: list[int]
    params: list[Tensor]
    hyper: dict[str, Any]
    mode: int

    def with_state(self, key: str) -> tuple[list[int], list[dict[str, Any]]]:
        """Which of `params` have `key` in their state (the others were never updated), and their states."""
        states = [self.optimizer.state.get(p, {}) for p in self.params]
        used = [i for i, state in enumerate(states) if key in state]
        return used, [states[i] for i in used]

    def gradient(self, i: int) -> Tensor:
        """The gradient of the step, still in `.grad`."""
        grad = self.params[i].grad
        if grad is None:
            raise ValueError(
                f"base_params: tensor {self.rows[i]} (shape {tuple(self.params[i].shape)}) has no .grad, which the"
                " adaptation needs; call meta_grad after optimizer.step() and before zero_grad()"
            )
        if grad.is_sparse:
            raise TypeError(
                f"base_params: tensor {self.rows[i]} has a sparse .grad; build the embedding with sparse=False"
            )
        return grad


def apply(plan: Sequence[OpCall], v: list[Tensor | None], backend: str) -> list[Tensor]:
    """Run the plan: v <- D d in place. Entries without a direct gradient stay None, and entries that no call covers
    become None: the optimizer has not moved those parameters, so D = 0 for them.

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
        lists = [[entries[k] for k in used] if entries else [] for entries in call.lists]
        numbers = [] if call.coefficients is None else [_rows(call.coefficients, used)]
        norm_sqs.append(call.op([v[call.rows[k]] for k in used], *lists, *numbers, **call.options, backend=backend))
    v[:] = adapted
    if not norm_sqs:  # the meta loss reads nothing that the optimizer moved
        norm_sqs.append(torch.zeros((), dtype=torch.float64, device=device))
    return norm_sqs


def _rows(coefficients: Tensor, used: list[int]) -> Tensor:
    """Not by indexing with a list, for which torch would copy it to the device."""
    return coefficients if len(used) == len(coefficients) else torch.stack([coefficients[k] for k in used])
