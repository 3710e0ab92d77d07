"""What the pictures have in common: colours, axes without clutter, files written whole."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import NullLocator  # noqa: E402

# Okabe and Ito's, told apart by every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT, LINES, BAND, BAD = "#22272e", "#6e7781", "#d8dee4", "#f3f5f7", "#b3002d"


def tidy(axes: Axes) -> None:
    """A grid of major lines behind the data, and nothing else."""
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8.5, colors=INK)
    axes.spines[:].set_visible(False)


def title(figure: Figure, text: str, note: str) -> None:
    """A title and, under it, what it was taken on; to be left 0.65 inches at the top."""
    height = figure.get_size_inches()[1]
    top = 1 - 0.24 / height
    figure.text(0.012, top, text, fontsize=15, weight="bold", color=INK, va="center")
    figure.text(0.012, 1 - 0.52 / height, note, fontsize=9, color=FAINT, va="center")


def write(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", facecolor="white")
    os.replace(partial, path)
