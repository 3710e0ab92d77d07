"""Where the backward pass is cut. Outputs never depend on any of this."""

from __future__ import annotations

import operator
from dataclasses import dataclass

__all__ = ["Chunked", "Truncation", "as_truncation"]


def _as_int(value: object) -> int | None:
    """``value`` as an int if it is one in Python's sense (an int, a NumPy integer; not a bool)."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _positive_int(name: str, value: object) -> int:
    number = _as_int(value)
    if number is None:
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


@dataclass(frozen=True)
class Chunked:
    """Regular truncation: the state is detached every ``k`` steps.

    The gradient does not cross the boundaries t = k, 2k, 3k, ...; the last chunk may be short. It
    is what a loop over segments of ``k`` steps computes that calls ``detach()`` on the state
    between them, but the chunks' backward passes run side by side as one larger batch. Both
    directions of a bidirectional network are cut at the same places, and so is every sequence of
    a packed batch, each counting from its own first step.

    Args:
        k: steps in a chunk, at least 1. With k >= T it is full backpropagation through time.

    Raises:
        TypeError: ``k`` is not an int.
        ValueError: ``k`` is less than 1.
    """

    k: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", _positive_int("Chunked's k", self.k))


Truncation = Chunked


def as_truncation(value: Truncation | int | None) -> Truncation | None:
    """What a ``truncation`` argument stands for: an int ``k`` is short for ``Chunked(k)``.

    Raises:
        TypeError: ``value`` is neither None, an int nor a truncation.
        ValueError: ``value`` is an int less than 1.
    """
    if value is None or isinstance(value, Chunked):
        return value
    if _as_int(value) is None:
        raise TypeError(
            "truncation must be None, an int or fastbptt.Chunked, "
            f"got {value!r} of type {type(value).__name__}"
        )
    return Chunked(_positive_int("truncation", value))
