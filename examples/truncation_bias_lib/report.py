"""The tables of the three parts."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from .bias import Bias
from .cost import Cost
from .training import Run


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head, the first column its legend."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for legend, *cells in rows:
        padded = [legend.ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("| " + " | ".join(padded) + " |")
    rule = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])


def _table(
    measured: Sequence[Any], columns: Sequence[str], cells: Callable[[list[Any]], Sequence[str]]
) -> str:
    """A row a mode, and for each length the columns that `cells` makes of what was measured."""
    lengths = list(dict.fromkeys(one.steps for one in measured))
    rows = [["truncation", *(f"T = {T}: {column}" for T in lengths for column in columns)]]
    for mode in dict.fromkeys(one.mode for one in measured):
        of_mode = [one for one in measured if one.mode == mode]
        row = (cells([one for one in of_mode if one.steps == T]) for T in lengths)
        rows.append([mode, *(cell for group in row for cell in group)])
    return _markdown(rows)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def bias_table(biases: Sequence[Bias]) -> str:
    """Of one loss: the bias at both weights, each with its error; the deviation halfway."""

    def cells(both: list[Bias]) -> list[str]:
        found = [f"{_number(one.bias)} ± {_number(one.error)}" for one in both]
        return [*found, _number(both[-1].deviation)]

    return _table(biases, ("bias at the start", "halfway", "deviation"), cells)


def learning_table(runs: Sequence[Run]) -> str:
    """Of one loss: the held-out error at the end, and the steps until it was low enough."""

    def cells(only: list[Run]) -> list[str]:
        (run,) = only
        error = run.curve[-1][1]
        shown = f"{error:.4f}" if math.isfinite(error) else "diverged"
        return [shown, str(run.reached or "not reached")]

    return _table(runs, ("error", "steps"), cells)


def cost_table(costs: Sequence[Cost]) -> str:
    """Milliseconds of a training step, and their ratio to those of full backpropagation."""

    def cells(only: list[Cost]) -> list[str]:
        (one,) = only
        return [f"{one.seconds * 1e3:.2f}", f"{one.ratio:.2f}"]

    return _table(costs, ("ms", "ratio"), cells)
