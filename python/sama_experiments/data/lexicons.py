"""Sentiment lexicons as labelling functions: VADER, AFINN and TextBlob, each with a score whose sign is its vote."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.errors import ExperimentError
from .votes import ABSTAIN

VOTERS = ["VADER", "AFINN", "TextBlob"]


def _package(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ExperimentError(f"the movie reviews need the package {package}: pip install {package}") from error


def _scorers() -> list[Callable[[str], float]]:
    """One function per voter: a text's score, above 0 for praise and 0 where the lexicon knows no word of the text."""
    vader = _package("vaderSentiment.vaderSentiment", "vaderSentiment").SentimentIntensityAnalyzer()
    afinn = _package("afinn", "afinn").Afinn()
    blob = _package("textblob", "textblob").TextBlob
    return [
        lambda text: vader.polarity_scores(text)["compound"],
        # AFINN adds up word values of -5 to 5; the others are in [-1, 1].
        lambda text: afinn.score(text) / 4,
        lambda text: blob(text).sentiment.polarity,
    ]


def lexicon_votes(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Scores and votes of the three lexicons.

    Returns:
        votes: int64 [N, 3], 1 for a score above 0, 0 for one below, ABSTAIN at exactly 0.
        scores: float32 [N, 3], in (-1, 1).
    """
    scorers = _scorers()
    scores = torch.tensor([[score(text) for score in scorers] for text in texts]).reshape(len(texts), len(scorers))
    votes = torch.where(scores == 0, ABSTAIN, (scores > 0).long())
    return votes, scores.tanh()
