"""The command line of the few-shot program."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any

from ..common.arguments import add_device, add_out, add_score_on, add_seeds, positive, positive_float, taken
from .methods import METHODS, Settings

# Appendix D has no table: it "closely follows the experiment setup in iMAML". So these are iMAML's for 20-way Omniglot:
# its text (gradient descent, 25 steps, lambda 2; 64 filters, in the middle of our widths), its published commands
# (learning rates, 20,000 meta steps, as many query as support images, 600 test tasks), and 16 tasks a step as in MAML.
PAPER: dict[str, Any] = {
    "widths": [16, 32, 64, 128, 256],
    "methods": ["sama"],
    "seeds": [0],
    "inner_optimizer": "sgd",
    "inner_lr": 0.1,
    "inner_steps": 25,
    "strength": 2.0,
    "meta_steps": 20_000,
    "meta_batch": 16,
    "meta_lr": 1e-3,
    "meta_schedule": "constant",
    "queries": None,
    "test_tasks": 600,
}

# A look at the program in about half a minute: 5-way tasks, two widths.
QUICK: dict[str, Any] = {
    "ways": 5,
    "widths": [8, 32],
    "seeds": [0],
    "meta_steps": 40,
    "test_tasks": 40,
}

EPILOG = """\
The base level of a task: theta starts at lambda and takes --inner-steps steps on cross-entropy on the support set +
strength/2 |theta - lambda|^2. The meta loss is cross-entropy on the query set; its gradient in lambda is averaged over
the tasks of a meta batch. The term makes the mixed derivative -strength times the identity: SAMA's meta gradient is
strength * D d, exactly, whatever alpha; with SGD as inner optimizer D is its learning rate.

the paper's own setup (Appendix D follows iMAML; it has no table), with Omniglot unpacked in a folder; days on a CPU:
  python -m sama_experiments.few_shot --paper --data omniglot/
several processes divide the tasks of a meta batch:
  OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m sama_experiments.few_shot
"""


@dataclass(frozen=True)
class Options:
    """A parsed command line; ``settings`` holds what concerns a run itself."""

    data: str | None
    split: str
    rotations: bool | None
    widths: list[int]
    shots: list[int]
    methods: list[str]
    seeds: list[int]
    score_on: str
    device: str
    out: str
    restart: bool
    settings: Settings

    def kept(self) -> dict[str, Any]:
        """What the results depend on, for the checkpoint."""
        return {name: value for name, value in asdict(self).items() if name not in ("out", "restart", "device")}


def parse(arguments: list[str] | None = None) -> Options:
    """Parse ``arguments`` (default: ``sys.argv``); ``--paper`` and ``--quick`` change defaults that others override."""
    parser = _parser()
    first = parser.parse_args(arguments)
    if first.paper or first.quick:
        parser.set_defaults(**(PAPER if first.paper else QUICK))
    values = vars(parser.parse_args(arguments))
    options: Options = taken(Options, values, settings=taken(Settings, values))
    return options


def _not_negative(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else positive_float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sama_experiments.few_shot",
        description="Appendix D: few-shot classification of characters from a learned initialisation, for several "
        "widths of the network.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    presets = parser.add_mutually_exclusive_group()
    presets.add_argument(
        "--paper", action="store_true", help="take iMAML's setup, which the paper follows, as defaults; others override"
    )
    presets.add_argument("--quick", action="store_true", help="5-way tasks, two widths, one seed: half a minute")
    _add_data(parser)
    _add_runs(parser)
    _add_base(parser)
    _add_meta(parser)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    d = Settings()
    add = parser.add_argument_group("data and model").add_argument
    add("--data", metavar="FOLDER", help="Omniglot (default: letters of the fonts that come with matplotlib)")
    add(
        "--split",
        choices=("random", "folders"),
        default="random",
        help="of Omniglot: all characters at random, as in MAML and iMAML, or images_evaluation for the test "
        "(default: %(default)s)",
    )
    add(
        "--rotations",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="characters turned by 90, 180, 270 degrees are further classes (default: with --data)",
    )
    add("--widths", nargs="+", type=positive, default=[8, 16, 32, 64], metavar="N", help="(default: 8 16 32 64)")
    add(
        "--norm",
        choices=("batch", "group"),
        default=d.norm,
        help="batch: by the statistics of the batch at hand, in the test too, as in iMAML; group: each image by itself "
        "(default: %(default)s)",
    )
    add(
        "--downsample",
        choices=("stride", "pool"),
        default=d.downsample,
        help="stride-2 convolutions, as in MAML and iMAML on Omniglot, or max pooling (default: %(default)s)",
    )


def _add_runs(parser: argparse.ArgumentParser) -> None:
    d = Settings()
    add = parser.add_argument_group("runs").add_argument
    add("--ways", type=positive, default=d.ways, metavar="N", help="classes of a task (default: %(default)s)")
    add("--shots", nargs="+", type=positive, default=[1, 5], metavar="K", help="support images of each (default: 1 5)")
    default_methods = ["scratch", "fomaml", "sama"]
    add(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=default_methods,
        metavar="METHOD",
        help=f"{', '.join(METHODS)} (default: {' '.join(default_methods)})",
    )
    # The settings were chosen with seeds from 100 on, on validation classes.
    add_seeds(add, [0, 1])
    add_score_on(add, "the classes that are held out")
    add("--test-tasks", type=positive, default=d.test_tasks, metavar="N", help="(default: %(default)s)")
    add(
        "--test-queries",
        type=positive,
        default=d.test_queries,
        metavar="N",
        help="query images of each class (default: %(default)s)",
    )
    add_device(add)
    add_out(add, "few_shot_results")


def _add_base(parser: argparse.ArgumentParser) -> None:
    d = Settings()
    add = parser.add_argument_group("base level").add_argument
    add("--inner-optimizer", choices=("sgd", "adam"), default=d.inner_optimizer, help="(default: %(default)s)")
    add("--inner-lr", type=positive_float, default=d.inner_lr, help="(default: %(default)s)")
    add("--inner-steps", type=positive, default=d.inner_steps, metavar="N", help="(default: %(default)s)")
    add(
        "--strength",
        type=positive_float,
        default=d.strength,
        help="of the pull towards the initialisation, iMAML's lambda (default: %(default)s)",
    )
    add(
        "--scratch-lr",
        type=positive_float,
        default=d.scratch_lr,
        help="of the baselines without meta learning (default: %(default)s)",
    )
    add(
        "--scratch-steps",
        type=positive,
        default=d.scratch_steps,
        metavar="N",
        help="steps of the one that may take more (default: %(default)s)",
    )


def _add_meta(parser: argparse.ArgumentParser) -> None:
    d = Settings()
    add = parser.add_argument_group("meta level").add_argument
    add("--meta-steps", type=positive, default=d.meta_steps, metavar="N", help="(default: %(default)s)")
    add("--meta-batch", type=positive, default=d.meta_batch, metavar="N", help="tasks a step (default: %(default)s)")
    add("--meta-lr", type=positive_float, default=d.meta_lr, help="Adam (default: %(default)s)")
    add(
        "--meta-schedule",
        choices=("cosine", "constant"),
        default=d.meta_schedule,
        help="of the meta learning rate (default: %(default)s)",
    )
    add(
        "--queries",
        type=positive,
        default=d.queries,
        metavar="N",
        help="query images of each class in training (default: %(default)s; with --paper as many as support images)",
    )
    add("--alpha", type=positive_float, default=d.alpha, help="size of SAMA's perturbation (default: %(default)s)")
    add(
        "--solver-steps",
        type=positive,
        default=d.solver_steps,
        metavar="N",
        help="Hessian-vector products of conjugate gradients and Neumann (default: %(default)s)",
    )
    add("--damping", type=_not_negative, default=d.damping, help="of conjugate gradients (default: %(default)s)")
