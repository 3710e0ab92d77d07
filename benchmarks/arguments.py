"""Types for the programs' arguments: what argparse says when one is wrong."""

from __future__ import annotations

from argparse import ArgumentTypeError

from .rows import Size, parse_size


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
