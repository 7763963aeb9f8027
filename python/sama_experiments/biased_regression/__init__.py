"""Biased regression, Appendix E of the paper."""

from .program import main

__all__ = ["main"]
