"""The user's own data: importance weights, suspected label errors and pruning for a text-classification set."""

from .program import main

__all__ = ["main"]
