"""What an argument of a cell is drawn from in each call, where it is no number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastbptt import ops

_DRAWN_TYPES = (torch.float32, torch.float64)


def _size(shape: tuple[int, ...], per_sequence: bool) -> tuple[int, ...]:
    count, _, *rest = shape
    return (count, 1, *rest) if per_sequence else shape


@dataclass(frozen=True)
class Bernoulli:
    """``value`` with probability ``p`` and else 0, drawn in training; else its mean, p value.

    On a CPU in float32 and float64 it is drawn by Philox4x32-10, whose seed comes from torch's
    generator: the same for any number of threads, ``p`` to the nearest multiple of 2^-32.

    Args:
        p: the probability, in [0, 1].
        value: what it is then.
        per_sequence: draw once for all steps of a sequence, not for each.

    Raises:
        ValueError: ``p`` is not in [0, 1].
    """

    p: float
    value: float = 1.0
    per_sequence: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"Bernoulli's p must be in [0, 1], got {self.p}")

    @property
    def mean(self) -> float:
        """What takes its place outside training."""
        return self.p * self.value

    def draw(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Of ``shape`` [layers * directions, T, B, H], with the dtype and device of ``like``."""
        drawn = like.new_empty(_size(shape, self.per_sequence))
        if drawn.is_cpu and drawn.dtype in _DRAWN_TYPES and not ops.is_watched(drawn):
            ops.bernoulli_(drawn, self.p, self.value)  # torch's own is drawn by one thread
        else:
            drawn.bernoulli_(self.p)
            if self.value != 1:
                drawn = drawn * self.value
        return drawn.expand(shape)


@dataclass(frozen=True)
class Normal:
    """Normal noise of mean 0, drawn in training; else 0.

    Args:
        std: its standard deviation, at least 0.
        per_sequence: draw once for all steps of a sequence, not for each.

    Raises:
        ValueError: ``std`` is negative.
    """

    std: float
    per_sequence: bool = False
    mean = 0.0

    def __post_init__(self) -> None:
        if not self.std >= 0:
            raise ValueError(f"Normal's std must be at least 0, got {self.std}")

    def draw(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Of ``shape`` [layers * directions, T, B, H], with the dtype and device of ``like``."""
        drawn = like.new_empty(_size(shape, self.per_sequence)).normal_(0.0, self.std)
        return drawn.expand(shape)
