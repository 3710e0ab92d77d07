"""The command line."""

from argparse import ArgumentParser

from shared_lib.command_line import Parser, positive_int, seed

from .task import TASKS


def make_parser(description: str) -> ArgumentParser:
    """All the options and their defaults."""
    parser = Parser(description)
    add = parser.add_argument
    add("--task", choices=TASKS, default=next(iter(TASKS)), help="the lags of its sequences")
    add("--updates", type=positive_int, default=1000, help="updates of a run")
    add("--seeds", type=positive_int, default=2, help="runs of each setting")
    add("--seed", type=seed, default=0, help="decides on all that is random")
    add("--every", type=positive_int, default=25, help="updates from one measurement to the next")
    add("--threads", type=positive_int, default=1, help="CPU threads")
    parser.add_out("runs/adaptive_truncation")
    return parser
