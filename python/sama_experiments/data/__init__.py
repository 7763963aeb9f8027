"""Weakly labelled text data: the shipped movie reviews and folders in the WRENCH format."""

from .reviews import load_reviews
from .votes import ABSTAIN, majority_vote, vote_features
from .weak_dataset import Split, WeakDataset
from .wrench import load_wrench

__all__ = ["ABSTAIN", "Split", "WeakDataset", "load_reviews", "load_wrench", "majority_vote", "vote_features"]
