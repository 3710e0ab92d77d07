"""The command line."""

import argparse
from pathlib import Path

from shared_lib.command_line import Parser, learning_rate, positive_float, positive_int, seed
from shared_lib.layers import BACKENDS

from .tasks import TASKS


def make_parser(description: str) -> argparse.ArgumentParser:
    """All the options and their defaults."""
    parser = Parser(description)
    _add_task_options(parser.add_argument_group("task"))
    _add_model_options(parser.add_argument_group("model"))
    _add_training_options(parser.add_argument_group("training"))
    parser.add_argument_group("output").add_argument(
        "--out",
        type=Path,
        default=Path("runs/recurrent_ppo"),
        metavar="DIR",
        help="folder for the plot",
    )
    return parser


def fraction(text: str) -> float:
    """An option's value between 0 and 1, both included."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, but was {text!r}")
    return value


def _add_task_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--task",
        choices=tuple(TASKS),
        default="tmaze",
        help="tmaze: a cue at the first step is wanted at the last; repeat-first: it is wanted at "
        "every step; repeat-previous: what was seen some steps before is wanted",
    )
    group.add_argument(
        "--keep",
        type=positive_int,
        metavar="N",
        help="steps for which what was seen is wanted: of the longest corridor (default: 10), of "
        "an episode that repeats its first symbol (24), back to the symbol to repeat (2)",
    )
    group.add_argument("--envs", type=positive_int, default=16, help="environments side by side")
    group.add_argument(
        "--steps", type=positive_int, default=128, help="steps of a rollout in each of them"
    )


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--backend",
        choices=(*BACKENDS, "both"),
        default="both",
        help="both: torch and fastbptt, from equal weights, and a comparison",
    )
    group.add_argument("--cell", choices=("lstm", "gru"), default="lstm", help="recurrent core")
    group.add_argument("--hidden", type=positive_int, default=64, help="units of the core")


def _add_training_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--updates", type=positive_int, default=80, help="rollouts to collect and train on"
    )
    group.add_argument(
        "--chunk",
        type=positive_int,
        metavar="K",
        help="cut backpropagation into chunks of so many steps of a rollout (default: not at all)",
    )
    group.add_argument(
        "--epochs", type=positive_int, default=4, help="training passes over each rollout"
    )
    group.add_argument(
        "--lr", type=learning_rate, default=3e-3, help="learning rate of Adam at the start"
    )
    group.add_argument("--gamma", type=fraction, default=0.98, help="discount of a step")
    group.add_argument("--lam", type=fraction, default=0.95, help="lambda of the advantages")
    group.add_argument(
        "--clip", type=positive_float, default=0.2, help="how far a probability's ratio may go"
    )
    group.add_argument(
        "--entropy", type=fraction, default=0.01, help="weight of the bonus for entropy"
    )
    group.add_argument("--seed", type=seed, default=0, help="decides on all that is random")
    group.add_argument(
        "--threads",
        type=positive_int,
        default=1,
        help="CPU threads; steps of small batches have no work for more",
    )
