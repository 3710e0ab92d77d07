"""The command line."""

from argparse import ArgumentParser

from shared_lib.command_line import Parser, positive_int, seed


def make_parser(description: str) -> ArgumentParser:
    """All the options and their defaults."""
    parser = Parser(description)
    add = parser.add_argument
    add("--windows", type=positive_int, default=3000, help="updates, one after each window")
    add("--segments", type=positive_int, default=300, help="updates, one after each segment")
    add("--seeds", type=positive_int, default=5, help="runs of what is random")
    add("--seed", type=seed, default=0, help="decides on all that is random")
    parser.add_out("runs/influence_balancing")
    return parser
