"""Which family adapts which optimizer type: those of other packages by name, those that users add, those refused."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, overload

from torch.optim import Optimizer

from sama_kernels.adaptation import low_bit, step_record
from sama_kernels.adaptation.adafactor import transformers_adafactor
from sama_kernels.adaptation.constant import sign
from sama_kernels.adaptation.general import Update, general
from sama_kernels.adaptation.plan import Family

_families: dict[type[Optimizer], Family] = {}
"""Those of torch.optim."""
_registered: dict[type[Optimizer], Family] = {}
"""What users added; these come first."""

BY_NAME: dict[str, Family] = {
    "transformers.optimization.Adafactor": general(transformers_adafactor),
    **low_bit.FAMILIES,
    **{f"lion_pytorch.{module}.Lion": sign for module in ("lion_pytorch", "cautious_lion", "foreach")},
    "timm.optim.lion.Lion": sign,
    **{f"bitsandbytes.optim.lion.{paged}Lion{bits}": sign for paged in ("", "Paged") for bits in ("", "8bit", "32bit")},
}
"""Types of packages that may not be installed, by module and name; they are never imported from here."""

_REFUSED: dict[str, str] = {
    "torch.optim.sparse_adam.SparseAdam": "its gradient is sparse, but v and theta+- are dense (a whole table, most of"
    " it never touched); build the embedding with sparse=False and train it with torch.optim.Adam",
    "torch.optim.lbfgs.LBFGS": "one of its steps makes several evaluations of the loss, so that its update is not a"
    ' function of one gradient; take another optimizer, or pass adaptation="none" (SAMA-NA, D = I)',
    "torch.distributed.optim.zero_redundancy_optimizer.ZeroRedundancyOptimizer": "each rank has the optimizer state of"
    " some of the parameters only; shard the model with torch.distributed.fsdp.fully_shard instead, and give it an"
    ' ordinary optimizer, or pass adaptation="none" (SAMA-NA, D = I)',
}
"""By module and name of the type."""

for _name in BY_NAME:
    step_record.watch(_name)


def provide(families: dict[type[Optimizer], Family]) -> None:
    """Add the families of torch.optim."""
    _families.update(families)
    for optimizer_type in families:
        step_record.watch(optimizer_type)


def family_of(optimizer_type: type[Optimizer]) -> Family:
    """The family of exactly this type.

    Raises:
        TypeError: there is none (there is no silent identity).
    """
    found = _find(optimizer_type)
    if found is not None:
        return found
    name = step_record.name(optimizer_type)
    if name in _REFUSED:
        raise TypeError(f"optimizer: there is no adaptation for {name}: {_REFUSED[name]}")
    raise TypeError(
        f"optimizer: no adaptation for {name}; the exact type counts, and sama_kernels.info()['optimizers'] lists those"
        " that have one. Add it with sama_kernels.register_adaptation (worked example: docs/optimizers.md), or pass"
        ' adaptation="none" for SAMA-NA, which takes D = I'
    )


def supported() -> list[str]:
    """Names of the types that have an adaptation: torch's, those of other packages, those that users added."""
    usable = [name for name, family in BY_NAME.items() if family is not low_bit.paged]
    own = [step_record.name(t) for t in _registered if t not in _families]
    return [f"torch.optim.{t.__name__}" for t in _families] + usable + [n for n in own if n not in usable]


@overload
def register_adaptation(optimizer_type: type[Optimizer], update: Update, *, overwrite: bool = False) -> Update: ...


@overload
def register_adaptation(
    optimizer_type: type[Optimizer], update: None = None, *, overwrite: bool = False
) -> Callable[[Update], Update]: ...


def register_adaptation(optimizer_type: Any, update: Any = None, *, overwrite: bool = False) -> Any:
    """Give an optimizer type of your own an adaptation: say what its update u is as a function of the gradient.

    SAMA needs v = (du/dg)^T d. It is made by autograd from `update`, one parameter at a time, so that memory stays
    bounded; u need not be element-wise. Do it once, before the first base step: from then on the library notes with
    which hyperparameters optimizers of this type make their steps. Also a decorator:
    ``@register_adaptation(MyOptimizer)``.

    Arguments:
        optimizer_type: a subclass of torch.optim.Optimizer. Optimizers of exactly this type are meant, not those of
            its subclasses.
        update: (grad, param, state, hyper) -> u, where theta after the step = theta before - u, shaped like `grad`.
            Summands of u that do not depend on `grad` (decoupled weight decay) may be left out. `grad` is the gradient
            of the step, float64 for a float64 parameter, else float32, and requires grad. `param` is theta AFTER the
            step, and `state` the optimizer's state for it AFTER the step (a dict; step counter included): to say how a
            tensor of it depends on `grad` write `carried(state["m"], (1 - beta) * grad)`. 16-bit ones come as float32.
            `hyper` holds the hyperparameters of the parameter group at the step. All are to be read only. No
            `.item()` or `if` on tensors of an accelerator, which would wait for it.
        overwrite: replace an adaptation that there is already, the library's own included.
    Returns:
        `update`, or without it the decorator.
    Raises:
        TypeError: not an optimizer type; `update` does not take four arguments.
        ValueError: the type has an adaptation already, and `overwrite` is False.
    With adaptation="exact" v is (du/dg)^T d to the letter, with "paper" cells with g = 0 and u = 0 (the step did not
    see them) are 0. A derivative that is not finite, such as that of sqrt at 0, makes the result `degenerate`.
    """
    if not (isinstance(optimizer_type, type) and issubclass(optimizer_type, Optimizer)):
        raise TypeError(f"optimizer_type: expected a subclass of torch.optim.Optimizer, got {optimizer_type!r}")
    if not overwrite and _find(optimizer_type) not in (None, low_bit.paged):
        raise ValueError(
            f"optimizer_type: {step_record.name(optimizer_type)} has an adaptation already; pass overwrite=True to"
            " replace it"
        )

    def register(function: Update) -> Update:
        _check_signature(function)
        _registered[optimizer_type] = general(function)
        step_record.watch(optimizer_type)
        return function

    return register if update is None else register(update)


def _check_signature(update: Any) -> None:
    if not callable(update):
        raise TypeError(f"update: expected a function (grad, param, state, hyper) -> u, got {update!r}")
    try:
        inspect.signature(update).bind(None, None, None, None)
    except TypeError as error:
        raise TypeError(f"update: it must take four arguments, (grad, param, state, hyper): {error}") from None


def _find(optimizer_type: type[Optimizer]) -> Family | None:
    found = _registered.get(optimizer_type) or _families.get(optimizer_type)
    return found or (BY_NAME.get(step_record.name(optimizer_type)) if _is_importable(optimizer_type) else None)


def _is_importable(optimizer_type: type[Optimizer]) -> bool:
    """Whether the type is what its name says, and not another one that was given the same name."""
    module = sys.modules.get(optimizer_type.__module__)
    return getattr(module, optimizer_type.__qualname__, None) is optimizer_type
