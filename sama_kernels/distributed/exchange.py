"""What the ranks exchange in one meta step: a fixed sequence of collectives, the same on every rank.

    the sums of the weights, if there are any
    the direct gradient d, where v has to be the same everywhere
    the meta gradient
    the status

Those of FSDP, of tensor parallelism and of the closures come between them. A rank that raises stands in for itself in
whatever is left of them (`standing_in`), and the others then raise as well, instead of waiting for it for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from traceback import clear_frames
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sama_kernels.distributed.agreement import Status, Verdict, agree, describe
from sama_kernels.distributed.alone import Alone, Form, Share
from sama_kernels.distributed.buckets import Bucket
from sama_kernels.distributed.fsdp import averages_over, fsdp_modules
from sama_kernels.distributed.meeting import Failed
from sama_kernels.distributed.reduction import OverlappedReduction
from sama_kernels.distributed.sharded import is_sharded, lacks_ranks
from sama_kernels.distributed.standing_in import Attendance, CannotStandIn
from sama_kernels.types import Problem, Synchronisation


class Exchange(Alone):
    """One meta step's exchange over the ranks of a group. Leaving its block with an error tells the others.

    With `sync="full"`, or where theta is updated, d is averaged too, so that v, epsilon and theta+- are the same bits
    everywhere; its buckets are adapted as they arrive. DTensors are averaged by whoever has sharded them, not here.
    """

    def __init__(self, problem: Problem, how: Synchronisation) -> None:
        super().__init__(problem)
        base_params, meta_params, group = problem.base_params, problem.meta_params, how.group
        world, device = dist.get_world_size(group), base_params[0].device
        # FSDP averages gradients of lambda that every rank has divided by its own epsilon, which must be the same.
        meta_owned = any(id(p) in problem.owned for p in meta_params)
        # A theta of which FSDP has a part only is put together from parts that every rank has moved: by one epsilon.
        base_owned = sum(id(p) in problem.owned for p in base_params)
        partly = 0 < base_owned < len(base_params)
        direct = how.sync == "full" or problem.update_base or meta_owned or partly
        _agree(problem, how)
        _check_placements(problem, direct, group)
        if how.weight is not None:
            _check_weighted(problem, group)
        self._loss_shares = self._share_base, self._share_meta = _shares(how.weight, world, group, device)
        if base_owned or meta_owned:
            self.meta_factor, self._share_meta = self._share_meta * world, 1 / world
        if meta_owned:
            self.base_factor, self._share_base = self._share_base * world, 1 / world
        self._times = world if how.comm_hook is not None else 1  # such a hook divides by it
        self._meta_sharded = [is_sharded(p) for p in meta_params]
        self._attendance = Attendance(group, device) if world > 1 else None
        self._v: list[Tensor | None] = [None] * len(base_params)
        self._norm_sqs: list[Tensor] = []
        self._at_once = problem.clipping.rank_one
        # 16-bit gradients of lambda are differenced and averaged in float32.
        meta_like = {
            row: torch.empty_like(p, dtype=torch.float32, device="meta") if p.element_size() == 2 else p
            for row, p in enumerate(meta_params)
            if not is_sharded(p)
        }
        base_like = {row: p for row, p in enumerate(base_params) if direct and not is_sharded(p)}

        def reduction(like: dict[int, Tensor], **work: Any) -> OverlappedReduction:
            return OverlappedReduction(like, device, group, how.bucket_mib, comm_hook=how.comm_hook, **work)

        self._direct = reduction(base_like, prepare=Bucket.zero_missing, arrived=self._adapt_bucket)
        self._meta = reduction(meta_like, prepare=self._form_bucket)
        self._status = Status(group, device)

    def shares_of(self, row: int) -> tuple[Share, Share]:
        """A DTensor's gradients are averages already."""
        return (1.0, 1.0) if self._meta_sharded[row] else (self._share_base, self._share_meta)

    @contextmanager
    def meta_backward(self) -> Iterator[None]:
        """d is averaged over the ranks as it appears; autograd then returns memory of the buckets."""

        def send(row: int) -> Callable[[Tensor], Tensor]:
            def hook(grad: Tensor) -> Tensor:
                if grad.layout != torch.strided:
                    return grad  # `loss_checks.dense` refuses it
                view = self._direct.view(row)
                torch.mul(grad.detach(), self._share_meta * self._times, out=view)
                self._direct.ready(row)
                return view

            return hook

        with _hooks(self._params, self._direct.rows, send):
            yield

    def adapted(self, d: list[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor]]:
        """v of the averaged d, in the memory of the buckets, or of this rank's d."""
        if not self._direct.rows:
            return super().adapted(d)
        self._direct.wait()
        for norm_sq in self._norm_sqs:  # made on the side stream, read on this one
            if norm_sq.is_cuda:
                norm_sq.record_stream(torch.cuda.current_stream(norm_sq.device))
        rest = [None if row in self._direct.rows else x for row, x in enumerate(d)]
        if self._at_once:
            rest = [self._direct.view(row) if row in self._direct.rows else x for row, x in enumerate(d)]
        if any(x is not None for x in rest):
            self._norm_sqs += self.adapt(rest)
        v = [x if done is None else done for x, done in zip(rest, self._v, strict=True)]
        d.clear()
        self._v = []
        return v, self._norm_sqs

    def begin_last_pass(self, first: Sequence[Tensor | None], form: Form) -> None:
        """The gradients of the pass before the last one go into the buckets."""
        super().begin_last_pass(first, form)
        for row in self._meta.rows:
            view, grad = self._meta.view(row), first[row]
            if grad is None:
                view.zero_()
            else:
                view.copy_(grad)
            self._first[row] = None

    @contextmanager
    def last_backward(self, params: Sequence[Tensor], before: Sequence[Tensor | None]) -> Iterator[None]:
        """Each gradient is taken as it appears; when a bucket is complete its meta gradient is formed and sent."""
        if len(self._meta.rows) < len(params):  # gradients of the others come only when `.backward()` is over
            yield
            return

        def send(row: int) -> Callable[[Tensor], None]:
            def hook(grad: Tensor) -> None:
                earlier = before[row]
                grad = grad.detach()
                grad = grad.float() if grad.element_size() == 2 else grad
                taken[row] = grad if earlier is None else earlier + grad
                self._meta.ready(row)

            return hook

        self.taken = taken = list(before)
        with _hooks(params, self._meta.rows, send):
            yield

    def meta_gradient(self, last: Sequence[Tensor | None]) -> list[Tensor]:
        """The averages over the ranks."""
        assert self._form is not None
        self.taken = list(last)
        self._meta.wait()
        sharded = [row for row, is_one in enumerate(self._meta_sharded) if is_one]
        formed = self._form(sharded, [self._first[row] for row in sharded], [last[row] for row in sharded])
        of_row = dict(zip(sharded, formed, strict=True))
        return [of_row[row] if row in of_row else self._meta.view(row) for row in range(len(last))]

    def conclude(
        self, losses: Sequence[Tensor], degenerate: Tensor, norm: Tensor, bad: Tensor | None
    ) -> Verdict | None:
        """The losses, averaged, and what other ranks report.

        Arguments:
            losses: of the meta batch, and two of the base batch; this rank's.
            bad: whether this rank's gradients are not to be used.
        Raises:
            meeting.Failed: another rank raised.
        """
        base, meta = self._loss_shares
        shares = [x for x in self._loss_shares if isinstance(x, Tensor)]  # 0 / 0 where all weights are 0
        finite = torch.stack([x.isfinite() for x in (*losses, norm, *shares)]).all()
        shared = [x.double() * share for x, share in zip(losses, (meta, base, base), strict=True)]
        if self._attendance is not None:
            self._attendance.over = True
        verdict = self._status.report(shared, degenerate, finite if bad is None else finite & ~bad)
        if self._attendance is not None and not (may_wait(norm.device) and verdict.complete):
            self._attendance.arrive()
        return verdict

    def __enter__(self) -> Exchange:
        if self._attendance is not None:
            self._attendance.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Exception):
                self._tell(error)
        finally:
            if self._attendance is not None:
                self._attendance.end()
            super().__exit__(kind, error, trace)

    def _tell(self, error: Exception) -> None:
        """The other ranks that this one has failed, if they do not know."""
        broken = self._meta.broken or self._direct.broken
        if self._attendance is None or self._attendance.over or broken:
            return
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            clear_frames(error.__traceback__)  # they hold the activations in whose place the stand-in's zeros fit
        try:
            self._attendance.fail()
        except Failed as first:
            raise first from error
        except (CannotStandIn, RuntimeError) as why:  # torch's, of a store or of peers that are gone
            error.add_note(
                f"sama_kernels: other ranks may wait for this one in a collective ({why}); let this process end, and"
                " torchrun ends the job"
            )

    def _adapt_bucket(self, bucket: Bucket) -> None:
        """v = D d of one bucket, as soon as its sum is there."""
        if self._at_once:
            return
        part: list[Tensor | None] = [None] * len(self._v)
        for row, view in zip(bucket.rows, bucket.views, strict=True):
            part[row] = view
        self._norm_sqs += self.adapt(part)
        for row in bucket.rows:
            self._v[row] = part[row]

    def _form_bucket(self, bucket: Bucket) -> None:
        """This rank's addend of the meta gradient, as soon as the last pass has all of the bucket."""
        assert self._form is not None and self.taken is not None
        self._form(bucket.rows, [*bucket.views], [self.taken[row] for row in bucket.rows])
        if self._times != 1:
            bucket.flat.mul_(self._times)


def may_wait(device: torch.device) -> bool:
    """Whether reading a number from `device`, such as whether all ranks have come, costs the host no waiting. Else the
    hosts meet."""
    return device.type == "cpu"


def ranks_of(problem: Problem) -> Alone:
    """Those that take part in a meta step."""
    return Alone(problem) if problem.synchronisation is None else Exchange(problem, problem.synchronisation)


def _agree(problem: Problem, how: Synchronisation) -> None:
    """All ranks are about to make the same collectives."""
    given = {True: "given", False: "not given"}
    description = {
        "base_params": describe(problem.base_params),
        "meta_params": describe(problem.meta_params),
        "sync": how.sync,
        "update_base": problem.update_base,
        "algorithm": problem.algorithm,
        "adaptation": problem.adaptation,
        "difference": problem.difference,
        "rounding": problem.rounding,
        "clip_coef": given[problem.clipping.coef is not None],
        "clip_rank_one": problem.clipping.rank_one,
        "clip_value": problem.clipping.value,
        "grad_scaler": given[problem.loss_scale is not None],
        "weight": given[how.weight is not None],
        "bucket_mib": how.bucket_mib,
        "comm_hook": given[how.comm_hook is not None],
    }
    agree(how.group, description, problem.base_params[0].device, at_first={"alpha": problem.alpha})


def _check_placements(problem: Problem, direct: bool, group: Any) -> None:
    """DTensors that nobody averages over data-parallel ranks."""
    checked = (("base_params", problem.base_params if direct else ()), ("meta_params", problem.meta_params))
    for name, params in checked:
        for i, p in enumerate(params):
            if lacking := lacks_ranks(p, group):
                raise ValueError(
                    f"{name}: tensor {i} is a DTensor of which rank {lacking[0]} has no part, so that its gradient"
                    " would not be averaged over all ranks of the group; use fully_shard on a mesh with a data-parallel"
                    ' dimension over all of them (a closure has to reach the module), or sync="none"'
                )


def _check_weighted(problem: Problem, group: Any) -> None:
    """Weights are shares of the group's sum, so FSDP must not average over other ranks."""
    ranks = {*dist.get_process_group_ranks(group or dist.group.WORLD)}
    params = (*problem.base_params, *problem.meta_params)
    if others := sorted(averages_over(fsdp_modules(problem.reached), params) - ranks):
        raise ValueError(
            f"weight: fully_shard averages gradients over rank {others[0]} too, which is not in `group`, and whose"
            " weight is not known; pass a group of all ranks of its mesh, or leave weight out"
        )


def _shares(
    weight: tuple[float, float] | None, world: int, group: Any, device: torch.device
) -> tuple[float | Tensor, float | Tensor]:
    if weight is None:
        return 1 / world, 1 / world
    # Filled on the device: a copy from the host would wait for it.
    own = torch.stack([torch.full((), x, dtype=torch.float64, device=device) for x in weight])
    total = own.clone()
    dist.all_reduce(total, group=group)
    base, meta = (own / total).unbind()
    return base, meta


@contextmanager
def _hooks(
    params: Sequence[Tensor], rows: Sequence[int], hook_of: Callable[[int], Callable[[Tensor], Any]]
) -> Iterator[None]:
    handles = [params[row].register_hook(hook_of(row)) for row in rows]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
