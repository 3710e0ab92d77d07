"""What is measured: the grid of sizes, as data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastbptt.truncation import Chunked, Truncation

FORWARD = "forward"  # one call under no_grad
BACKWARD = "forward+backward"  # one call, and the gradients of the input and of every parameter
MODES = (FORWARD, BACKWARD)


Size = tuple[int, int, int, Truncation | None]  # T, B, H, truncation


@dataclass(frozen=True)
class Row:
    """One line of the table: a cell at one size, I = H, with one truncation."""

    cell: str  # a key of contenders.CELLS
    T: int
    B: int
    H: int
    truncation: Truncation | None = None

    @property
    def size(self) -> Size:
        """The row without its cell."""
        return self.T, self.B, self.H, self.truncation

    @property
    def label(self) -> str:
        """The row's name within its cell, such as ``1024,1,128 Chunked(k=32)``."""
        size = f"{self.T},{self.B},{self.H}"
        return size if self.truncation is None else f"{size} {self.truncation}"

    def modes(self, asked: Iterable[str]) -> list[str]:
        """The modes worth timing: truncation changes nothing in the forward pass."""
        return [mode for mode in asked if mode == BACKWARD or self.truncation is None]


GRID: tuple[Size, ...] = (
    (128, 1, 64, None),
    (128, 1, 256, None),
    (128, 16, 64, None),
    (128, 16, 256, None),
    (128, 64, 256, None),
    (128, 16, 512, None),
    (128, 64, 512, None),
    (64, 64, 1024, None),
    (1024, 16, 128, None),
    (1024, 1, 128, None),
    (35, 32, 256, None),
    (1024, 1, 128, Chunked(32)),
    (1024, 16, 128, Chunked(32)),
)


def parse_size(text: str) -> Size:
    """``T,B,H`` or ``T,B,H,k`` (truncated to chunks of k steps) as a size.

    Raises:
        ValueError: ``text`` is anything else.
    """
    fields = text.split(",")
    if len(fields) not in (3, 4) or not all(f.strip().isdecimal() and int(f) for f in fields):
        raise ValueError(f"must be T,B,H or T,B,H,k, all integers above 0, got {text!r}")
    T, B, H, *k = (int(field) for field in fields)
    return T, B, H, Chunked(*k) if k else None


def format_size(size: Size) -> str:
    """The text that :func:`parse_size` reads as ``size``."""
    *shape, truncation = size
    return ",".join(map(str, shape if truncation is None else [*shape, truncation.k]))


def select(cells: Sequence[str], sizes: Sequence[Size], filters: Sequence[str] = ()) -> list[Row]:
    """The rows of these cells and sizes whose ``cell label`` contains one of the filters."""
    rows = [Row(cell, *size) for cell in cells for size in sizes]
    if not filters:
        return rows
    wanted = [text.lower() for text in filters]
    return [
        row for row in rows if any(text in f"{row.cell} {row.label}".lower() for text in wanted)
    ]
