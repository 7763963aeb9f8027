"""Optimizers wrapped by accelerate, Lightning and Fabric: the one inside makes the steps, and it alone counts."""

from __future__ import annotations

from typing import Any

_WRAPPERS = {
    "accelerate.optimizer.AcceleratedOptimizer",
    "pytorch_lightning.core.optimizer.LightningOptimizer",
    "lightning.pytorch.core.optimizer.LightningOptimizer",
    "lightning_fabric.wrappers._FabricOptimizer",
    "lightning.fabric.wrappers._FabricOptimizer",
}
"""They change nothing about the step. Others may (Lookahead, SAM), so these are known by name. Also their subclasses:
Lightning derives one for every optimizer."""


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of accelerate, Lightning and Fabric; anything else as it is."""
    while any(f"{t.__module__}.{t.__qualname__}" in _WRAPPERS for t in type(optimizer).__mro__):
        optimizer = optimizer.optimizer
    return optimizer


def scaler_of(optimizer: Any, grad_scaler: Any) -> Any:
    """`grad_scaler`, or if that is None the one with which accelerate's wrapper makes the steps.

    Raises:
        ValueError: both are there, and not the same.
    """
    own = getattr(optimizer, "scaler", None) if unwrapped(optimizer) is not optimizer else None
    if own is None or grad_scaler is None:
        return own if grad_scaler is None else grad_scaler
    if own is not grad_scaler:
        raise ValueError(
            f"grad_scaler: {type(optimizer).__name__} makes its steps with another scaler; leave the argument out"
        )
    return grad_scaler
