"""The command line."""

import argparse

from shared_lib.command_line import Parser, learning_rate, positive_float, positive_int, seed


def _several(text: str) -> int:
    """An option's value that counts something of which there must be five."""
    number = positive_int(text)
    if number < 5:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 5, but was {text!r}")
    return number


def make_parser(description: str) -> argparse.ArgumentParser:
    """All the options and their defaults."""
    parser = Parser(description)
    add = parser.add_argument
    add("--units", type=_several, default=100, help="units, of which four fifths are excitatory")
    add("--batch", type=positive_int, default=32, help="trials of a training step")
    add("--steps", type=positive_int, default=600, help="training steps")
    add("--trials", type=positive_int, default=200, help="trials of each coherence in the curve")
    add("--lr", type=learning_rate, default=5e-3, help="learning rate of Adam")
    add("--noise", type=positive_float, default=0.05, help="standard deviation of the units' noise")
    add("--rounds", type=positive_int, default=7, help="times that a training step is timed")
    add("--seed", type=seed, default=0, help="decides on all that is random")
    add("--threads", type=positive_int, default=2, help="CPU threads")
    parser.add_out("runs/decision_net")
    return parser
