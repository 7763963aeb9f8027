"""Continued pretraining with learned weights of the auxiliary texts, section 4.2 of the paper."""

from .program import main

__all__ = ["main"]
