"""Noisy finetuning with learned data weights and labels, section 4.1 of the paper."""

from .program import main

__all__ = ["main"]
