"""The speedups as a picture: a dot a row and peer, its quartiles, and where sgemm would be."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator  # noqa: E402

from .contenders import CELLS  # noqa: E402
from .results import Record  # noqa: E402
from .rows import MODES  # noqa: E402
from .tables import machine_line  # noqa: E402

_COLOURS = ("#1f6fb4", "#e07b26", "#2c9a5f", "#8a56b8", "#c23b54")
_INK, _FAINT, _BAND, _BAD = "#22272e", "#8b949e", "#f4f6f8", "#c62828"


def _label(record: Record) -> str:
    size = record["size"]
    text = f"T {size['T']:>4}   B {size['B']:>2}   H {size['H']:>4}"
    return text if record["truncation"] is None else f"{text}\n{record['truncation']}"


def _kind(peer: str) -> str:
    """What peers of several cells have in common: torch.nn, for one."""
    return "torch.nn" if peer.startswith("torch.nn.") else peer


def _number(value: float) -> str:
    return f"{value:.2f}×" if value < 9.95 else f"{value:.0f}×"


def _dot(axes: Axes, y: float, record: Record, peer: str, colour: str) -> None:
    """One row's speedup over one peer: stem from 1, whisker, dot, number; and sgemm's tick."""
    ratio, reach = record["speedup"][peer], record["reach"][peer]["median"]
    axes.plot([1, ratio["median"]], [y, y], color=colour, lw=5, alpha=0.28, solid_capstyle="butt")
    axes.plot([ratio["q1"], ratio["q3"]], [y, y], color=colour, lw=2, solid_capstyle="butt")
    axes.plot(ratio["median"], y, "o", ms=7, color=colour, mec="white", mew=1, zorder=4)
    axes.plot([reach, reach], [y - 0.18, y + 0.18], color=_INK, lw=1.6, zorder=3)
    text = _number(ratio["median"])
    axes.text(
        0.985,
        y,
        text,
        transform=axes.get_yaxis_transform(),
        ha="right",
        va="center",
        fontsize=9.5,
        weight="bold",
        color=colour,
    )


def _panel(
    axes: Axes,
    mode: str,
    rows: dict[tuple[str, str], Record],
    records: list[Record],
    colours: dict[str, str],
) -> None:
    """One mode: every row of the figure on its line, empty where it was not timed."""
    found = {(r["cell"], r["row"]): r for r in records if r["mode"] == mode}
    for y, key in enumerate(rows):
        if y % 2:
            axes.axhspan(y - 0.5, y + 0.5, color=_BAND, lw=0, zorder=0)
        record = found.get(key)
        if record is None:
            continue
        if record["error"] is not None:
            axes.text(
                0.985,
                y,
                "FAILED",
                transform=axes.get_yaxis_transform(),
                ha="right",
                va="center",
                fontsize=9.5,
                weight="bold",
                color=_BAD,
            )
            continue
        peers = list(record["speedup"])
        for i, peer in enumerate(peers):
            _dot(axes, y + (i - (len(peers) - 1) / 2) * 0.4, record, peer, colours[_kind(peer)])
    axes.axvline(1, color=_FAINT, lw=1.2, zorder=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", which="major", color="#d0d7de", lw=0.7, zorder=0)
    axes.set_title(mode, fontsize=12, weight="bold", color=_INK, loc="left", pad=6)
    axes.tick_params(length=0, labelsize=9, colors=_INK)
    axes.spines[:].set_visible(False)


def draw(results: Record) -> Figure:
    """The figure of a comparison's results; rows stand in the order they were measured."""
    records = results["records"]
    rows = {(r["cell"], r["row"]): r for r in records}
    modes = [mode for mode in MODES if any(r["mode"] == mode for r in records)]
    peers = dict.fromkeys(_kind(peer) for r in records for peer in r.get("speedup", ()))
    colours = {peer: _COLOURS[i % len(_COLOURS)] for i, peer in enumerate(peers)}
    cells = dict.fromkeys(r["cell"] for r in records)

    height = 2.2 + 0.42 * len(rows)
    figure = Figure(figsize=(5.4 * len(modes) + 1.8, height), layout="constrained", dpi=150)
    figure.get_layout_engine().set(rect=(0, 0.35 / height, 1, 1 - 1.2 / height))
    panels = figure.subplots(1, len(modes), sharex=True, sharey=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        _panel(axes, mode, rows, records, colours)
    low, high = panels[0].get_xlim()
    low = min(low, 0.9)
    panels[0].set_xlim(low, high * (high / low) ** 0.14)  # room for the numbers on the right
    panels[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    names = [
        f"{cell.upper():<4}  {_label(r)}" if len(cells) > 1 else _label(r)
        for (cell, _), r in rows.items()
    ]
    panels[0].set_yticks(range(len(rows)), names, family="monospace")

    kinds = ", ".join(CELLS[cell].label for cell in cells)
    figure.text(
        0.012,
        1 - 0.3 / height,
        f"fastbptt {kinds}: speedup",
        fontsize=14,
        weight="bold",
        color=_INK,
        va="center",
    )
    marks = [
        Line2D([], [], color=colours[peer], marker="o", ms=7, lw=2, label=f"over {peer}")
        for peer in peers
    ]
    marks.append(
        Line2D(
            [],
            [],
            color=_INK,
            marker="|",
            ms=12,
            mew=1.6,
            lw=0,
            label="sgemm: the same FLOPs as torch.mm",
        )
    )
    figure.legend(
        handles=marks,
        loc="upper left",
        bbox_to_anchor=(0.004, 1 - 0.48 / height),
        ncols=len(marks),
        frameon=False,
        fontsize=9.5,
    )
    note = f"Median and quartiles of paired ratios, log scale. {machine_line(results)}"
    figure.text(0.012, 0.17 / height, note, fontsize=8, color=_FAINT, va="center")
    return figure


def write_plot(results: Record, path: Path) -> None:
    """Draws a comparison's results into a PNG, whole or not at all; nothing without records."""
    if not results["records"]:
        return
    partial = path.with_name(f".{path.name}.partial")
    draw(results).savefig(partial, format="png", facecolor="white")
    os.replace(partial, path)
