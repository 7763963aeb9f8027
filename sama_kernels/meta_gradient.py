"""`meta_grad`, `meta_backward`, `sama_loss`: the public entry points, and the algorithm as five steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from sama_kernels import adaptation as adaptations
from sama_kernels import backends, checks, clipping, differences, learned, loss_checks, ops, scaling
from sama_kernels.algorithms import Algorithm, Sama, SamaNA, second_order
from sama_kernels.algorithms.options import resolve
from sama_kernels.direction import adaptation_of
from sama_kernels.distributed import CommHook, arguments, fsdp, quiet, ranks_of
from sama_kernels.function import SamaFunction
from sama_kernels.guards import Interrupts, RngState, frozen
from sama_kernels.hooks import unhooked
from sama_kernels.integrations.optimizers import scaler_of, unwrapped
from sama_kernels.passes import buffer_guard, direct_gradient
from sama_kernels.perturbation import Perturbation
from sama_kernels.reach import reachable
from sama_kernels.shared_memory import apart, separate
from sama_kernels.types import Closure, MetaGradient, Problem, Relative

P = ParamSpec("P")
R = TypeVar("R")


def meta_grad(
    base_loss: Closure | Sequence[Closure],
    meta_loss: Closure,
    *,
    base_params: nn.Module | Iterable[Tensor | nn.Module],
    meta_params: nn.Module | Iterable[Tensor | nn.Module],
    optimizer: torch.optim.Optimizer | None,
    alpha: float | Relative = 1.0,
    adaptation: str = "paper",
    update_base: bool = False,
    sync: str = "final",
    group: Any = None,
    backend: str = "auto",
    hold: str = "auto",
    rounding: str = "nearest",
    seed: int | None = None,
    difference: str = "central",
    clip_coef: float | Tensor | None = None,
    clip_rank_one: bool = False,
    clip_value: float | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
    master_params: Iterable[Tensor] | None = None,
    weight: float | tuple[float, float] | None = None,
    bucket_mib: float = 25.0,
    comm_hook: CommHook | None = None,
    algorithm: str | Algorithm = "sama",
) -> MetaGradient:
    """The SAMA meta gradient dL_meta/dlambda (paper, Eq. 5), from three first-order passes.

    Call it after an ordinary base step (`loss.backward(); optimizer.step()`), while `.grad` is still there.

    Arguments:
        base_loss: L_base, a function () -> scalar tensor that reads theta and lambda; called twice at perturbed theta.
            A list of them (microbatches) has its losses and gradients summed. Inside it write `stop_gradient(x)` for
            `x.detach()`. Terms that do not read lambda may be left out, which saves their forward passes: what they
            did to theta is in `.grad` and in the optimizer's state.
        meta_loss: L_meta, a function () -> scalar tensor that reads theta (and lambda, if it likes).
        base_params: theta, an nn.Module or an iterable of leaf tensors and modules; float32, float64, bfloat16 or
            float16, any shapes; DTensors too (`fully_shard`, tensor parallelism). Those that do not require grad are
            left out. Their hooks (`register_hook`) act on d: right for what is linear, such as masks.
        meta_params: lambda, likewise, but need not be leaves; all tensors of an iterable must require grad. No tensor
            may be in both: where lambda is part of the model, pass the other parameters as base_params. Their hooks act
            once, on the result: in `meta_backward`, and in the backward pass of `sama_loss`, not here.
        optimizer: the torch optimizer that made the base step, of exactly one of the types in `info()["optimizers"]`
            (docs/optimizers.md) or one given to `register_adaptation`; or accelerate's, Lightning's or Fabric's wrapper
            of one. May be None with adaptation="none".
        alpha: L2 length of the perturbation over all of theta, absolute as in the paper. What matters is its size
            relative to ||theta||: 1.0 is 0.24 % for BERT-base (about 400); small networks want 0.01 to 0.1.
            `relative(1e-3)` is 1e-3 ||theta||. `diagnose` says whether it fits; docs/alpha.md says how to choose it.
        adaptation: "paper": D = du/dg without the epsilon term in its numerator, so that cells that were never touched
            count for nothing; "exact": D to the letter; "none": D = I (SAMA-NA).
        update_base: leave theta at theta - epsilon v afterwards (paper, end of section 3.2).
        sync: what the processes of `group` average (docs/distributed.md). "final": the meta gradient alone, while the
            last backward pass still runs (paper, section 3.3); theta is perturbed along each rank's own v. "full": d
            too, while the first one runs, so that v, epsilon and the result are those of one process on the whole
            batch. "none": nothing. With update_base "final" does the same as "full", as theta has to stay the same on
            all ranks. Without an initialised process group, or with one process, it has no effect.
        group: a process group of torch.distributed; None: all ranks.
        backend: "auto", "cpu", "cuda", "triton" or "reference"; an unavailable one is an error, never replaced.
        hold: where `stop_gradient` gets the values at theta: "auto": from the last ordinary call of a `@recorded`
            base_loss, else as with "center": from one more evaluation at theta.
        rounding: of theta + epsilon v to bfloat16 and float16 parameters: "nearest", or "stochastic", which makes the
            mean of the perturbation exact (to 0.2 %, see `ops.perturb`) where its entries, about alpha / sqrt(N), are
            less than half a unit in the last place and would be lost (about 1e9 parameters at alpha 1). `realised` in
            the result shows the need.
        seed: of the stochastic rounding, any integer, the same on all ranks. None: from `torch.initial_seed()` (not if
            there are several processes: they must round alike) and the number of steps that the optimizer has made, so
            that every meta step rounds anew (`state_dict` keeps both for a checkpoint). torch's generators are unused.
        difference: how dL_base/dlambda is differentiated along v. "central": between theta+ and theta-, error of order
            alpha^2 (the paper's). "forward": between theta and theta+, error of order alpha; the pass at theta also
            finds the values that `stop_gradient` holds. "exact": one pass at theta in forward mode, no alpha, theta is
            not moved; every operator of base_loss that reads theta must have forward-mode derivatives, which fused
            attention on the CPU and autograd.Functions without jvp have not; compiled parts run eagerly.
        clip_coef: what `clip_grad_norm_` multiplied the gradients by before the step, a number or a 0-dim tensor:
            `sk.clip_coef(total_norm, max_norm)`. du/dg is then D, at the clipped gradient, times this factor.
        clip_rank_one: also differentiate the norm in that factor (2-norm; base_params must be all that was clipped).
        clip_value: the bound given to `clip_grad_value_`: du/dg is 0 where it acted.
        grad_scaler: the GradScaler that makes the base steps. The closures return plain losses; all of them are
            multiplied by its scale and the results divided by it. From a step that it skipped, or if a gradient
            overflows here, the result is zeros with `degenerate` True. None: that of accelerate's wrapper, if any.
        master_params: the float32 copies that the optimizer steps in place of the bfloat16 or float16 base_params,
            one for each that requires grad, in their order; D comes from their state and `.grad`.
        weight: what this rank's losses count for in the averages, for instance the size of its batch; or two numbers,
            for base_loss and meta_loss. None: the same on all ranks.
        bucket_mib: gradients are sent in buckets of this size, in MiB.
        comm_hook: sends a bucket in place of all_reduce: a communication hook (group, bucket) -> future of the average,
            such as torch.distributed.algorithms.ddp_comm_hooks.default_hooks.bf16_compress_hook.
        algorithm: "sama", "sama_na", or another one: "t1_t2", "neumann", "conjugate_gradient", "nystrom", "truncated",
            "iterative", or one of `sama_kernels.algorithms` with its options, such as Neumann(terms=10). These need
            second derivatives of base_loss and the memory of its graph; alpha, difference, hold and rounding do not
            concern them.
    Returns:
        `MetaGradient`. If ||v|| is zero, tiny or not finite (at Adam's first step D is 0 by nature), `degenerate` is
        True and nothing was moved.
    Raises:
        ValueError, TypeError, RuntimeError, NotImplementedError: naming the argument and the cure.
    Afterwards, also after an error or Ctrl-C, parameters (unless update_base), `.grad`, buffers and the states of the
    random number generators are what they were, bit for bit; generator objects of the caller's own have moved by what
    meta_loss drew (not after an error). Extra memory: one buffer of theta's size.
    """
    grad_scaler, optimizer = scaler_of(optimizer, grad_scaler), unwrapped(optimizer)
    chosen = resolve(algorithm)
    adaptation = "none" if isinstance(chosen, SamaNA) else adaptation
    synchronisation = arguments.synchronisation(sync, group, weight, bucket_mib, comm_hook)
    checks.choice("adaptation", adaptation, checks.ADAPTATIONS)
    checks.choice("hold", hold, checks.HOLDS)
    checks.choice("rounding", rounding, checks.ROUNDINGS)
    checks.choice("difference", difference, checks.DIFFERENCES)
    base_losses, (meta_closure, *_) = checks.closures("base_loss", base_loss), checks.closures("meta_loss", meta_loss)
    reach = reachable((*base_losses, meta_closure, base_params, meta_params))
    gathering = fsdp.fsdp_modules(reach.modules)
    fsdp.synchronising(gathering)
    fsdp.reshard(gathering)  # a forward pass without a backward pass may have left modules gathered
    theta = checks.tensors("base_params", base_params, skip_frozen=True)
    lam = checks.tensors("meta_params", meta_params, skip_frozen=False)
    checks.leaves("base_params", theta)
    apart(theta)
    checks.disjoint(theta, lam, (base_params, meta_params))
    separate(theta, lam)
    checks.independent(lam)
    device = checks.one_device(theta, lam)
    masters = checks.masters(master_params, theta, update_base)
    stepped, name = (theta, "base_params") if masters is None else (masters, "master_params")
    if optimizer is not None or adaptation != "none":
        checks.held_by(optimizer, stepped, name)
    arguments.parts(theta, lam, difference=difference, clip_rank_one=clip_rank_one, master_params=master_params)
    loss_scale = scaling.scale_of(grad_scaler, device)
    loss_checks.no_renormalisation(reach.modules, theta)
    loss_checks.no_parametrization_cache(reach.modules)
    if reach.compiled:
        checks.no_graph_memory(device)
    problem = Problem(
        base_losses=base_losses,
        meta_loss=meta_closure,
        base_params=theta,
        meta_params=lam,
        compiled=reach.compiled,
        optimizer=optimizer,
        alpha=checks.length("alpha", alpha),
        adaptation=adaptation,
        update_base=bool(update_base),
        hold=hold,
        rounding=ops.STOCHASTIC if rounding == "stochastic" else ops.NEAREST,
        seed=_rounding_seed(seed, optimizer) if rounding == "stochastic" else 0,
        difference=difference,
        algorithm=repr(chosen),
        backend=backends.resolve(backend, device),
        clipping=clipping.checked(clip_coef, clip_rank_one, clip_value, device),
        loss_scale=loss_scale,
        skipped=scaling.step_skipped(optimizer, stepped, loss_scale is not None, name),
        master_params=masters,
        synchronisation=synchronisation,
        reached=tuple(reach.modules),
        generators=tuple(reach.generators),
        fsdp=gathering,
        owned=fsdp.managed(gathering),
    )
    arguments.same_direction(problem)
    torch.clear_autocast_cache()  # within an autocast block it holds theta as it was before the base step
    with learned.together():
        return _sama(problem) if isinstance(chosen, Sama | SamaNA) else second_order(problem, chosen)


def _rounding_seed(seed: int | None, optimizer: torch.optim.Optimizer | None) -> int:
    """The seed of this meta step's stochastic rounding, as a signed 64-bit integer."""
    if seed is None:
        if optimizer is None:
            raise ValueError('seed: without an optimizer rounding="stochastic" needs one, for example the step number')
        steps = adaptations.steps_made(optimizer)
        seed = adaptations.rounding_base(optimizer) + 0x9E3779B97F4A7C15 * steps  # 2^64 / golden ratio
    return (checks.integer("seed", seed) + 2**63) % 2**64 - 2**63


def called_like(_: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Give a function the signature of `meta_grad`, for help(), editors and type checkers."""

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        signature = inspect.signature(meta_grad)
        function.__signature__ = signature.replace(return_annotation=inspect.signature(function).return_annotation)  # type: ignore[attr-defined]
        return cast(Callable[P, R], function)

    return decorate


@called_like(meta_grad)
def meta_backward(*args: Any, **kwargs: Any) -> MetaGradient:
    """Like `meta_grad`, with the same arguments, and accumulates into the `.grad` of lambda, like `backward`."""
    kwargs["meta_params"], again = checks.twice(kwargs.get("meta_params"))
    result = meta_grad(*args, **kwargs)
    lam = checks.tensors("meta_params", again, skip_frozen=False)
    torch.autograd.backward(lam, result.grads)
    return result


@called_like(meta_grad)
def sama_loss(*args: Any, **kwargs: Any) -> Tensor:
    """The meta loss as a 0-dim tensor whose `.backward()` yields the SAMA gradient; same arguments as `meta_grad`.

    It can be added to other terms in lambda, and lambda may itself be computed from other tensors (a hypernetwork).
    The passes run here, not in `backward()`.
    """
    kwargs["meta_params"], again = checks.twice(kwargs.get("meta_params"))
    result = meta_grad(*args, **kwargs)
    lam = checks.tensors("meta_params", again, skip_frozen=False)
    loss: Tensor = SamaFunction.apply(lambda: result, *lam)  # type: ignore[no-untyped-call]
    return loss


def _sama(problem: Problem) -> MetaGradient:
    """SAMA in five steps."""
    with (
        Interrupts() as interrupts,
        torch.no_grad(),
        RngState(problem.generators) as rng,
        buffer_guard(problem) as buffers,
        ranks_of(problem) as ranks,
        quiet(problem.reached),
        unhooked(problem.meta_params),
    ):
        ranks.adapt = adaptation_of(problem)
        # 1. The direct gradient d.
        meta = direct_gradient(problem, ranks, interrupts)
        rng.follow()
        # 2. v = D d, in the memory of d.
        v, norm_sqs = ranks.adapted(meta.d)
        # 3. epsilon = alpha / ||v||, on the device.
        size = scaling.step_size(problem, norm_sqs)
        moving = [p for p, x in zip(problem.base_params, v, strict=True) if x is not None]
        directions = [x for x in v if x is not None]
        v.clear()  # "exact" replaces these tensors one by one
        with frozen(problem.base_params), Perturbation(moving, directions, problem.backend, problem.fsdp) as theta:
            # 4. dL_base/dlambda on both sides of theta, of the same function (or its derivative along v, if "exact"),
            # 5. and their difference quotient.
            out = differences.evaluate(problem, theta, size, meta, ranks, buffers, rng, interrupts)
    if problem.update_base:
        torch.clear_autocast_cache()
    realised, alignment = _realised(out.step, size.epsilon * size.norm)
    return MetaGradient(
        out.grads, *out.losses, out.size.norm, out.size.epsilon, out.size.degenerate, realised, alignment
    )


def _realised(step: Tensor | None, length: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of the step s = theta+ - theta that rounding left: <s, epsilon v> / ||epsilon v||^2, and the cosine of both."""
    if step is None:
        return None, None
    along, square = step
    # The norm of v is that before its rounding to 16 bits, by whose error the cosine could be larger than 1.
    return along / length.square(), (along / (length * square.sqrt())).clamp(max=1.0)
