"""Text data: the shipped reviews and texts of other domains, and folders in the formats of WRENCH and DAPT."""

from .classification import load_classification
from .domains import load_reviews_among_domains
from .reviews import load_reviews
from .text_dataset import LabelledTexts, TextDataset
from .votes import ABSTAIN, majority_vote, vote_features
from .weak_dataset import Split, WeakDataset
from .wrench import load_wrench

__all__ = [
    "ABSTAIN",
    "LabelledTexts",
    "Split",
    "TextDataset",
    "WeakDataset",
    "load_classification",
    "load_reviews",
    "load_reviews_among_domains",
    "load_wrench",
    "majority_vote",
    "vote_features",
]
