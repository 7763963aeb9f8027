"""The element-wise part of a meta step on tensors that stay where they are, and a stand-in for CUDA graphs of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from op_cases import same_bits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sama_kernels import ops

SHAPES = [(40, 30), (7,), (), (129,)]
ADAPTATIONS = ("paper", "exact", "moments", "low bit", "scale")
Run = Callable[[], object]


class ElementWisePart:
    """What happens between the passes; `fill` brings the numbers of a step.

    adaptation: one of ADAPTATIONS: Adam's two, RMSprop, Adam with 8-bit moments, SGD.
    """

    def __init__(self, device: str, backend: str, adaptation: str) -> None:
        self.backend, self.adaptation = backend, adaptation
        self.theta, self.v, self.grads, self.m, self.w, self.plus, self.minus, self.explicit = (
            [torch.zeros(s, device=device) for s in SHAPES] for _ in range(8)
        )
        self.m_codes, self.w_codes = ([torch.zeros_like(x, dtype=torch.uint8) for x in self.theta] for _ in range(2))
        self.m_scales, self.w_scales = ([torch.zeros(1, device=device) for _ in SHAPES] for _ in range(2))
        self.m_tables, self.w_tables = (
            [torch.linspace(low, 1, 256, device=device) for _ in SHAPES] for low in (-1.0, 0.0)
        )
        self.steps = [torch.zeros((), device=device) for _ in SHAPES]
        self.lr = torch.zeros((), device=device)
        self.coefficients = torch.zeros(len(SHAPES), 8, device=device, dtype=torch.float64)
        # Three rows, not three numbers: a copy into a float64 tensor of no dimensions is lost under aot_eager (2.13).
        self.sizes = torch.zeros(3, device=device, dtype=torch.float64)  # norm, epsilon, degenerate

    def adapt(self) -> Tensor:
        """v <- D d; returns ||v||^2."""
        adam: dict[str, Any] = {"lr": self.lr, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "backend": self.backend}
        if self.adaptation == "scale":
            return ops.adapt_norm_scale(self.v, 0.5, lr=self.lr, backend=self.backend)
        if self.adaptation == "moments":
            return ops.adapt_norm_moments(
                self.v, self.grads, [], self.w, [], [], self.coefficients, weight_decay=0.0, maximize=False,
                form=ops.RATIO, backend=self.backend,
            )  # fmt: skip
        if self.adaptation == "low bit":
            return ops.adapt_norm_low_bit_adam(
                self.v, self.grads, self.m_codes, self.m_scales, self.m_tables, self.w_codes, self.w_scales,
                self.w_tables, self.steps, block_size=2048, mode=ops.PAPER, **adam,
            )  # fmt: skip
        mode = ops.EXACT if self.adaptation == "exact" else ops.PAPER
        return ops.adapt_norm_adam(
            self.v, self.grads, self.m, self.w, [], [], self.steps, weight_decay=0.0, maximize=False, mode=mode, **adam
        )

    def to_plus(self) -> None:
        """v <- D d; epsilon; theta -> theta+."""
        norm, epsilon, degenerate = ops.step_size([self.adapt()], 0.3, 1e-30, backend=self.backend)
        self.sizes.copy_(torch.stack([norm, epsilon, degenerate.double()]))
        ops.perturb(self.theta, self.v, epsilon, ops.PLUS, backend=self.backend)

    def to_minus(self) -> None:
        """theta+ -> theta-."""
        ops.perturb(self.theta, self.v, self.sizes[1], ops.MINUS, backend=self.backend)

    def finish(self) -> None:
        """The difference quotient, and theta back."""
        ops.central_difference(
            self.plus, self.minus, self.explicit, self.sizes[1], self.sizes[0], backend=self.backend
        )  # fmt: skip
        ops.restore(self.theta, self.v, backend=self.backend)

    def whole(self) -> None:
        """All of it, as if the passes in between were free."""
        self.to_plus()
        self.to_minus()
        self.finish()

    def lists(self) -> list[list[Tensor]]:
        return [self.theta, self.v, self.grads, self.m, self.w, self.plus, self.minus, self.explicit]

    def fill(self, step: int) -> None:
        """New numbers in the same memory: another learning rate, another step count; no direct gradient at step 3."""
        generator = torch.Generator().manual_seed(step)
        for tensors in self.lists():
            for x in tensors:
                x.copy_(torch.randn(x.shape, generator=generator))
        for w, g in zip(self.w, self.grads, strict=True):
            w.copy_(0.01 * g.square() + 1e-3)
        for codes in (*self.m_codes, *self.w_codes):
            codes.copy_(torch.randint(1, 256, codes.shape, generator=generator))
        for scale in (*self.m_scales, *self.w_scales):
            scale.fill_(0.1 * step)
        if step == 3:
            for x in self.v:
                x.zero_()
        for t in self.steps:
            t.fill_(step + 1)
        self.lr.fill_(0.1 / step)
        # rate, a, b, slope, kappa, omega, eps, tail of RMSprop, and a rate that changes
        self.coefficients.copy_(torch.tensor([0.1 / step, 1.0, 0.0, 1.0, 1.0, 0.01, 1e-8, 0.0], dtype=torch.float64))

    def state(self) -> list[Tensor]:
        return [x.clone() for x in [*(x for part in self.lists() for x in part), self.sizes]]


def check_replays(
    part: Callable[[], ElementWisePart], capture: Callable[[list[Run]], list[Run]], steps: int = 5
) -> None:
    """Replays of what was captured of one part are eager calls of another, bit for bit, with new numbers each time."""
    eager, replayed = part(), part()
    replayed.fill(9)
    to_plus, to_minus, finish = capture([replayed.to_plus, replayed.to_minus, replayed.finish])
    norms = []
    for step in range(1, steps + 1):
        for x in (eager, replayed):
            x.fill(step)
        theta = [x.clone() for x in eager.theta]
        for call, replay in ((eager.to_plus, to_plus), (eager.to_minus, to_minus), (eager.finish, finish)):
            call()
            replay()
            assert all(map(same_bits, replayed.state(), eager.state()))
            if call != eager.finish and step != 3:
                assert not any(map(torch.equal, replayed.theta, theta))
        assert all(map(same_bits, replayed.theta, theta))
        norm, epsilon, degenerate = replayed.sizes.tolist()
        assert degenerate == (step == 3) == (epsilon == 0)
        norms.append(norm)
    assert len(set(norms)) == steps


class Capture(TorchDispatchMode):
    """Notes what a function does to tensors, so that `replay` does it again with what is in their memory by then.

    Like a CUDA graph: the same operators on the same memory with the same numbers from the host. An operator that
    brings a number to the host is an error.

    kernels: calls one of our ops so that what it launches is captured; returns its result, and what replays it.
    """

    def __init__(self, kernels: Callable[..., tuple[Any, Run]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kernels = kernels
        self._again: list[Run] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number went to the host during the capture"
        kwargs = kwargs or {}
        if func.namespace.startswith("sama"):
            result, again = self._kernels(self, func, args, kwargs)
        else:
            result = func(*args, **kwargs)
            again = _into(result, lambda: func(*args, **kwargs))
        self._again.append(again)
        return result

    def note(self, again: Run) -> None:
        """`again` is to be done in a replay, after what was noted before."""
        self._again.append(again)

    def replay(self) -> None:
        for again in self._again:
            again()


def _into(result: Any, call: Run) -> Run:
    """Call again, and put what comes out where it came out before."""

    def again() -> None:
        for old, new in zip(tree_leaves(result), tree_leaves(call()), strict=True):
            if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # else a view, or written in place
                old.copy_(new)

    return again


def capture_by_mode(kernels: Callable[..., tuple[Any, Run]]) -> Callable[[list[Run]], list[Run]]:
    """A capture for `check_replays`: every function called once under a `Capture`."""

    def capture(functions: list[Run]) -> list[Run]:
        replays: list[Run] = []
        for function in functions:
            with Capture(kernels) as captured:
                function()
            replays.append(captured.replay)
        return replays

    return capture
