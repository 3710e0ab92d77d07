"""The sweeps of benchmarks.scaling, and what a size should cost by its neighbours."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..common.timing import Quartiles, paired_ratios

AXES = ("T", "B", "H", "layers")
CLIFF = 1.5  # times what the neighbours say
LOSS = 1.05  # two threads' time over one's: more is a loss
NEAR = 1.5  # neighbours are at most this factor away, beside the next ones


class Point(NamedTuple):
    """A size: I = H in every layer."""

    T: int
    B: int
    H: int
    layers: int = 1

    @property
    def multiply_adds(self) -> int:
        """Of the six products of a forward+backward, a gate."""
        return 6 * self.T * self.B * self.H * self.H * self.layers


@dataclass(frozen=True)
class Sweep:
    """The sizes that differ from ``base`` in one axis."""

    axis: str
    base: Point
    values: tuple[int, ...]

    def point(self, value: int) -> Point:
        """The size at a value of the axis."""
        return self.base._replace(**{self.axis: value})

    @property
    def at(self) -> str:
        """The other axes, such as ``T=32, B=16``."""
        others = {k: v for k, v in self.base._asdict().items() if k != self.axis}
        return ", ".join(f"{k}={v}" for k, v in others.items() if k != "layers" or v > 1)

    def upto(self, limit: int) -> Sweep:
        """The same without the values above ``limit``."""
        return Sweep(self.axis, self.base, tuple(v for v in self.values if v <= limit))

    def among(self, wanted: Container[int]) -> Sweep:
        """The same with those of its values alone."""
        return Sweep(self.axis, self.base, tuple(v for v in self.values if v in wanted))


# Odd sizes stand around powers of two and multiples of a vector: where kernels have edges.
_T = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096, 10_000)
_B = (*range(1, 10), 12, *range(15, 19), 24, *range(31, 34), 48, *range(63, 66), 96, 127, 128, 129)
_H = (
    *(2, 4, 8, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 80, 96, 127, 128, 129, 160, 192),
    *(255, 256, 257, 320, 384, 511, 512, 513, 768, 1023, 1024, 1025, 1536, 2047, 2048),
)
_LAYERS = (1, 2, 3, 4, 6, 8)

SWEEPS = (
    Sweep("T", Point(1, 1, 64), (*_T, 30_000, 100_000)),
    Sweep("T", Point(1, 16, 128), _T),
    Sweep("B", Point(32, 1, 64), (*_B, 192, 256)),
    Sweep("B", Point(32, 1, 256), _B),
    Sweep("H", Point(32, 1, 1), _H),
    Sweep("H", Point(32, 16, 1), _H),
    Sweep("layers", Point(64, 1, 128), _LAYERS),
    Sweep("layers", Point(64, 16, 128), _LAYERS),
)
QUICK_LIMITS = {"T": 4096, "B": 129, "H": 513, "layers": 4}
QUICK_SWEEPS = tuple(sweep.upto(QUICK_LIMITS[sweep.axis]) for sweep in SWEEPS)

Times = Mapping[int, Sequence[float]]  # seconds by the axis' value, one a round


@dataclass(frozen=True)
class Excess:
    """How much more a size costs than its neighbours say: the worst that any of them say."""

    ratio: Quartiles
    neighbours: tuple[int, ...]


def _neighbours(values: Sequence[int], i: int) -> Iterator[tuple[int, ...]]:
    """Pairs around values[i] to interpolate between, and larger sizes, which cost no less."""
    lower = [j for j in range(i) if j == i - 1 or values[j] * NEAR >= values[i]]
    upper = [j for j in range(i + 1, len(values)) if j == i + 1 or values[j] <= values[i] * NEAR]
    for j in upper:
        yield (values[j],)
        for k in lower:
            yield values[k], values[j]


def interpolated(value: int, neighbours: tuple[int, ...], times: Times) -> list[float]:
    """What a size should cost in each round.

    Linear between the logarithms of size and time, so exact for every power law: it makes no
    difference whether it is the time or the time a FLOP or a step that is interpolated. One
    neighbour is a larger size, whose time is taken as it is.
    """
    if len(neighbours) == 1:
        return list(times[neighbours[0]])
    low, high = neighbours
    weight = math.log(value / low) / math.log(high / low)
    pairs = zip(times[low], times[high], strict=True)
    return [a ** (1 - weight) * b**weight for a, b in pairs]


def excess(value: int, neighbours: tuple[int, ...], times: Times) -> Excess:
    """A size's time over what these neighbours say, paired in the same round."""
    return Excess(paired_ratios(times[value], interpolated(value, neighbours, times)), neighbours)


def worst_excess(value: int, times: Times) -> Excess | None:
    """The greatest excess of a size over all its neighbours; None for the largest size."""
    values = sorted(times)
    found = [excess(value, near, times) for near in _neighbours(values, values.index(value))]
    return max(found, key=lambda e: e.ratio.median, default=None)
