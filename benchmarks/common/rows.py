"""What is measured: the grid of sizes, as data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastbptt.truncation import TBPTT, Chunked, Sliding, Truncation

FORWARD = "forward"  # one call under no_grad
BACKWARD = "forward+backward"  # one call, and the gradients of the input and of every parameter
MODES = (FORWARD, BACKWARD)
RESET_RATE = 1 / 32  # of rows with resets: the probability of one, at each step of each sequence


class Size(NamedTuple):
    """A row without its cell."""

    T: int
    B: int
    H: int
    truncation: Truncation | None = None
    resets: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the table: a cell at one size, I = H, with one truncation."""

    cell: str  # a key of workload.CELLS
    T: int
    B: int
    H: int
    truncation: Truncation | None = None
    resets: bool = False

    @property
    def size(self) -> Size:
        """The row without its cell."""
        return Size(self.T, self.B, self.H, self.truncation, self.resets)

    @property
    def label(self) -> str:
        """The row's name within its cell, such as ``1024,1,128 Chunked(k=32)``."""
        words = [f"{self.T},{self.B},{self.H}"]
        if self.truncation is not None:
            words.append(str(self.truncation))
        return " ".join(words + ["resets"] * self.resets)

    def described(self, mode: str) -> dict[str, object]:
        """What a record of measurements in a mode says of the row."""
        return {
            "cell": self.cell,
            "row": self.label,
            "size": {"T": self.T, "B": self.B, "I": self.H, "H": self.H},
            "truncation": None if self.truncation is None else str(self.truncation),
            "resets": self.resets,
            "mode": mode,
        }

    def modes(self, asked: Iterable[str]) -> list[str]:
        """The modes worth timing: truncation changes nothing in the forward pass."""
        return [mode for mode in asked if mode == BACKWARD or self.truncation is None]


GRID = (
    Size(128, 1, 64),
    Size(128, 1, 256),
    Size(128, 16, 64),
    Size(128, 16, 256),
    Size(128, 64, 256),
    Size(128, 16, 512),
    Size(128, 64, 512),
    Size(64, 64, 1024),
    Size(1024, 16, 128),
    Size(1024, 1, 128),
    Size(35, 32, 256),
    Size(1024, 1, 128, Chunked(32)),
    Size(1024, 16, 128, Chunked(32)),
    Size(1024, 4, 128, TBPTT(8, 32)),
    Size(512, 4, 128, Sliding(16)),
    Size(128, 8, 128, resets=True),
    Size(128, 16, 256, resets=True),
)

# Without what takes seconds a round: the largest products, and a peer that runs every window.
QUICK_GRID = tuple(
    size
    for size in GRID
    if size.T * size.B * size.H**2 < 2**31 and not isinstance(size.truncation, Sliding)
)


def parse_size(text: str) -> Size:
    """Reads ``T,B,H``, and after it ``,k`` (chunks of k steps), ``,k1,k2`` or ``,resets``.

    ``k1,k2`` is TBPTT(k1, k2), and with k1 = 1 Sliding(k2).

    Raises:
        ValueError: ``text`` is anything else.
    """
    fields = [field.strip() for field in text.split(",")]
    resets = fields[3:] == ["resets"]
    numbers = fields[:3] if resets else fields
    if not 3 <= len(numbers) <= 5 or not all(f.isdecimal() and int(f) for f in numbers):
        raise ValueError(
            "must be T,B,H or T,B,H,k or T,B,H,k1,k2 or T,B,H,resets, integers above 0, "
            f"got {text!r}"
        )
    T, B, H, *windows = map(int, numbers)
    if len(windows) < 2:
        return Size(T, B, H, Chunked(*windows) if windows else None, resets)
    k1, k2 = windows
    return Size(T, B, H, Sliding(k2) if k1 == 1 else TBPTT(k1, k2))


def format_size(size: Size) -> str:
    """The text that :func:`parse_size` reads as ``size``."""
    words = [size.T, size.B, size.H]
    if isinstance(size.truncation, Chunked):
        words.append(size.truncation.k)
    elif size.truncation is not None:
        words += [size.truncation.k1, size.truncation.k2]
    return ",".join(map(str, words + ["resets"] * size.resets))


def select(cells: Sequence[str], sizes: Sequence[Size], filters: Sequence[str] = ()) -> list[Row]:
    """The rows of these cells and sizes whose ``cell label`` contains one of the filters."""
    rows = [Row(cell, *size) for cell in cells for size in sizes]
    if not filters:
        return rows
    wanted = [text.lower() for text in filters]
    return [
        row for row in rows if any(text in f"{row.cell} {row.label}".lower() for text in wanted)
    ]
