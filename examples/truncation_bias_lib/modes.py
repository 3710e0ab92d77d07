"""The truncations that are compared."""

from collections.abc import Callable

import torch

import fastbptt
from fastbptt.truncation import Truncation

ALPHA = 4.0  # the power law's exponent
FULL = "full"

# A truncation is made anew for each use, so that its draws begin at the same seed.
Modes = dict[str, Callable[[int], Truncation | None]]


def stride(reach: int) -> int:
    """TBPTT's k1 beside a k2 of `reach`."""
    return max(1, reach // 3)


def modes(reach: int) -> Modes:
    """Full backpropagation, and the truncations with the same reach: name -> maker from a seed.

    The reach of a random truncation is the mean length of its segments. ``mean_length=L`` without
    ``alpha`` cuts with probability 1 / L, which is what ``pi = 1 - 1 / L`` does: one row shows
    both. "By sequence" stands for ``per_sequence=True``, the power law for ``alpha`` = 4.
    """
    k1, mean = stride(reach), float(reach)

    def randomized(**options: object) -> Callable[[int], Truncation]:
        return lambda seed: fastbptt.Randomized(
            mean_length=mean, generator=torch.Generator().manual_seed(seed), **options
        )

    return {
        FULL: lambda seed: None,
        f"Chunked({reach})": lambda seed: fastbptt.Chunked(reach),
        f"TBPTT({k1}, {reach})": lambda seed: fastbptt.TBPTT(k1, reach),
        f"Sliding({reach})": lambda seed: fastbptt.Sliding(reach),
        f"Randomized({reach})": randomized(),
        f"Randomized({reach}), by sequence": randomized(per_sequence=True),
        f"power law({reach})": randomized(alpha=ALPHA),
        f"power law({reach}), by sequence": randomized(alpha=ALPHA, per_sequence=True),
    }
