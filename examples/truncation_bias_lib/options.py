"""The command line."""

import argparse
from typing import Any

from shared_lib.command_line import Parser, learning_rate, positive_int, seed

from .problem import CELLS, LEARNING_RATES

# What a run does unless told otherwise, and what a quick one does.
DEFAULTS: dict[str, Any] = {"lengths": [20, 50, 100], "max_steps": 600, "draws": 80, "rounds": 15}
QUICK: dict[str, Any] = {"lengths": [20, 30], "max_steps": 240, "draws": 10, "rounds": 5}


def _at_least(least: int, what: str) -> Any:
    """The type of an option that counts something, from `least` upwards."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and int(text) >= least):
            raise argparse.ArgumentTypeError(
                f"must be {what} of at least {least}, but was {text!r}"
            )
        return int(text)

    return parse


def make_parser(description: str) -> argparse.ArgumentParser:
    """All the options and their defaults."""
    parser = Parser(description)
    add = parser.add_argument
    whole = "a whole number"
    add(
        "--lengths",
        type=_at_least(4, "whole numbers"),
        nargs="+",
        metavar="T",
        help=_preset("lengths", "steps of the sequences, one experiment for each"),
    )
    add("--cell", choices=CELLS, default="gru", help="recurrent layer")
    add("--hidden", type=positive_int, default=32, help="units of the layer")
    add("--batch", type=positive_int, default=32, help="sequences of a training step")
    add(
        "--reach",
        type=_at_least(2, whole),
        default=15,
        help="steps that a truncated gradient reaches back; the mean where it is random",
    )
    add(
        "--max-steps",
        type=positive_int,
        metavar="N",
        help=_preset("max_steps", "training steps after which a run is given up"),
    )
    rates = ", ".join(f"{rate:g} for {cell}" for cell, rate in LEARNING_RATES.items())
    add("--lr", type=learning_rate, help=f"learning rate of Adam (default: {rates})")
    add(
        "--draws",
        type=_at_least(2, whole),
        metavar="N",
        help=_preset("draws", "gradients from which bias and deviation are estimated"),
    )
    add(
        "--rounds",
        type=positive_int,
        metavar="N",
        help=_preset("rounds", "times that a training step is timed"),
    )
    add("--quick", action="store_true", help="a shorter run, by the defaults of some options")
    add("--seed", type=seed, default=0, help="decides on all that is random")
    add("--threads", type=positive_int, default=1, help="CPU threads; more pay with a larger net")
    parser.add_out("runs/truncation_bias")
    return parser


def _preset(name: str, text: str) -> str:
    full, quick = (
        " ".join(map(str, value)) if isinstance(value, list) else str(value)
        for value in (DEFAULTS[name], QUICK[name])
    )
    return f"{text} (default: {full}; with --quick {quick})"


def fill_in(args: argparse.Namespace) -> None:
    """Give the options that were not named the values that others decide on."""
    for name, value in (QUICK if args.quick else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.lengths = list(dict.fromkeys(args.lengths))
    if args.lr is None:
        args.lr = LEARNING_RATES[args.cell]
