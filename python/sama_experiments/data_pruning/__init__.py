"""Data pruning with learned importance weights, section 4.3 of the paper."""

from .program import main

__all__ = ["main"]
