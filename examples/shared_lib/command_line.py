"""The command line: the parser, the types of options, and the exit status."""

import argparse
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

MAX_LR = 1e3  # far beyond what trains; at 1e38, Adam's step size would overflow


class BadInput(Exception):
    """An argument that cannot be used; the message names it, what it must be, and what it was."""


def positive_int(text: str) -> int:
    """An option's value that counts something."""
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but was {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """An option's value that measures something."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, but was {text!r}")
    return value


def learning_rate(text: str) -> float:
    """An option's value that Adam can work with."""
    value = positive_float(text)
    if value > MAX_LR:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_LR:g}, but was {text!r}")
    return value


def seed(text: str) -> int:
    """A seed that torch accepts."""
    if not (text.isascii() and text.isdecimal() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(
            f"must be a whole number from 0 to 2**63 - 1, but was {text!r}"
        )
    return int(text)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something: a value, neither None nor False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


class Parser(argparse.ArgumentParser):
    """Reports a bad option as every other bad input: in one line, without the usage."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def add_out(self, default: str) -> None:
        """The option of the folder that a program's picture goes to."""
        self.add_argument(
            "--out", type=Path, default=Path(default), metavar="DIR", help="folder for the picture"
        )

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise BadInput(message)


def run_program(
    run: Callable[[argparse.Namespace], int],
    parser: argparse.ArgumentParser,
    arguments: list[str] | None,
    interrupted: str,
    leads: bool = True,
) -> int:
    """Call `run` with the parsed arguments; returns the exit status.

    `interrupted` is what to say if Ctrl-C ends it. Of several processes with the same arguments,
    only the one that `leads` reports those that cannot be used.
    """
    try:
        return run(parser.parse_args(arguments))
    except BadInput as error:
        if leads:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 128 + signal.SIGINT
