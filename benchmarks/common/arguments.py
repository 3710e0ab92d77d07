"""What the programs' arguments have in common: types, checks, and the command that repeats one."""

from __future__ import annotations

import os
import shlex
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Container
from pathlib import Path

from . import isa, machine
from .rows import Size, format_size, parse_size


def count(text: str) -> int:
    """An integer above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"must be an integer above 0, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A time budget, up to a day."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 86400:
        raise ArgumentTypeError(f"must be seconds from 0 to a day, got {text!r}")
    return value


def size(text: str) -> Size:
    """A row's size, as :func:`benchmarks.rows.parse_size` reads it."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def add_isa(parser: ArgumentParser) -> None:
    """``--isa``, for :func:`benchmarks.common.isa.hold`."""
    parser.add_argument(
        "--isa",
        choices=list(isa.HELD),
        help="hold ours and its peers to this instruction set (default: each takes its best)",
    )


def add_common(parser: ArgumentParser, files: str) -> None:
    """``--isa``, and ``--out`` for these files."""
    add_isa(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=machine.results_folder(),
        help=f"folder for {files} (default: benchmarks/results/ and the instruction set, and "
        "with --threads its number)",
    )


def begin(parser: ArgumentParser, args: Namespace) -> None:
    """Before anything is measured: the instruction set, and a folder that can be written to.

    Results with a number of threads that was asked for lie beside those with torch's choice.
    """
    isa.hold(args.isa)
    if isinstance(args.threads, int) and args.out == parser.get_default("out"):
        args.out = args.out / f"threads_{args.threads}"
    check_writable(parser, args.out)


def check_writable(parser: ArgumentParser, folder: Path) -> None:
    """Finds out before the measurement, not after it, that --out cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        parser.error(f"argument --out: cannot write to {folder}: {error.strerror}")


def _word(value: object) -> str:
    if isinstance(value, Size):
        return format_size(value)
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def command(parser: ArgumentParser, args: Namespace, skip: Container[str] = ("out",)) -> str:
    """The command that takes a measurement again, without where it wrote."""
    words = parser.prog.split()
    for name, value in vars(args).items():
        if name in skip or value == parser.get_default(name):
            continue
        words.append(f"--{name}")
        if value is not True:
            words += map(_word, value if isinstance(value, list) else [value])
    return shlex.join(words)
