"""Few-shot image classification with a learned initialisation, Appendix D of the paper."""

from .program import main

__all__ = ["main"]
