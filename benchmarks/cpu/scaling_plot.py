"""Scaling as a picture: small multiples of the achieved rate, with the cliffs ringed."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator

from ..common.files import Record
from ..common.workload import CELLS
from .figures import BAD, COLOURS, INK, LINES, tidy, title, write
from .sweeps import AXES

_STYLES = ("-", (0, (2, 1.5)), (0, (1, 1)))


def _text(value: float, _: object = None) -> str:
    """1,500 as 1.5k."""
    return f"{value:g}" if value < 1000 else f"{value / 1000:g}k"


def _panel(axes: Axes, records: list[Record], colours: dict[str, str], threads: list[str]) -> None:
    """One axis of one cell: a line a sweep and number of threads."""
    for record in records:
        values = [point[record["axis"]] for point in record["points"]]
        rates = {
            n: [2e-6 * p["multiply_adds"] / p["ms"][n]["q1"] for p in record["points"]]
            for n in threads
        }
        for style, rate in zip(_STYLES, rates.values(), strict=False):
            axes.plot(values, rate, color=colours[record["at"]], ls=style, lw=1.5, marker=".", ms=4)
        for kind, mark in (("cliffs", "o"), ("losses", "s")):
            for found in record[kind]:
                at = found[record["axis"]]
                y = rates[str(found.get("threads", 2))][values.index(at)]
                axes.plot(at, y, mark, ms=10, mec=BAD, mfc="none", mew=1.6, zorder=5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    if records[0]["axis"] == "layers":
        axes.xaxis.set_major_locator(FixedLocator(values))
    else:
        base = 10 if records[0]["axis"] == "T" else 2
        axes.xaxis.set_major_locator(LogLocator(base, numticks=8))
    for each in (axes.xaxis, axes.yaxis):
        each.set_major_formatter(FuncFormatter(_text))
    axes.grid(color=LINES, lw=0.7)
    tidy(axes)


def draw(results: Record) -> Figure:
    """The figure: a row an axis, a column a cell."""
    records = [r for r in results["records"] if r["points"]]
    axes_names = [a for a in AXES if any(r["axis"] == a for r in records)]
    cells = list(dict.fromkeys(r["cell"] for r in records))
    threads = [str(n) for n in sorted(results["settings"]["threads"], reverse=True)]
    height = 2.65 * len(axes_names) + 1.3
    width = max(3.9 * len(cells) + 0.4, 8.6)
    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 1.0 / height), hspace=0.06)
    panels = figure.subplots(len(axes_names), len(cells), sharey="row", sharex="row", squeeze=False)
    for axis, line in zip(axes_names, panels, strict=True):
        ats = dict.fromkeys(r["at"] for r in records if r["axis"] == axis)
        colours = dict(zip(ats, COLOURS, strict=False))
        for cell, panel in zip(cells, line, strict=True):
            chosen = [r for r in records if (r["axis"], r["cell"]) == (axis, cell)]
            if not chosen:
                panel.set_visible(False)
                continue
            _panel(panel, chosen, colours, threads)
            panel.set_xlabel(axis, fontsize=10, weight="bold", color=INK, labelpad=1)
        line[0].set_ylabel("GFLOP/s", fontsize=9.5, color=INK)
        marks = [Line2D([], [], color=colour, lw=2, label=at) for at, colour in colours.items()]
        low, high = line[0].get_ylim()
        line[0].set_ylim(low / 1.6, high)  # room for the legend
        subs = (1, 2, 5) if high / low < 30 else (1, 3)
        line[0].yaxis.set_major_locator(LogLocator(subs=subs))
        line[0].legend(handles=marks, loc="lower right", fontsize=8, frameon=False)
    for cell, panel in zip(cells, panels[0], strict=True):
        panel.set_title(CELLS[cell].label, fontsize=12, weight="bold", color=INK)

    m = results["machine"]
    note = (
        f"{m['cpu']}, {m['cores']} cores, kernels {m['isa']}, {m['date'][:10]}. Higher is better."
    )
    title(figure, "fastbptt: how fast forward+backward computes as sizes grow", note)
    marks = [
        Line2D([], [], color=INK, ls=style, lw=1.5, label=f"{n} thread{'s' * (n != '1')}")
        for style, n in zip(_STYLES, threads, strict=False)
    ]
    ring = {"color": BAD, "mfc": "none", "mew": 1.6, "lw": 0, "ms": 9}
    marks.append(Line2D([], [], marker="o", **ring, label="cliff: over 1.5x its neighbours"))
    marks.append(Line2D([], [], marker="s", **ring, label="slower with two threads"))
    figure.legend(
        handles=marks,
        loc="upper left",
        bbox_to_anchor=(0.002, 1 - 0.6 / height),
        ncols=len(marks),
        frameon=False,
        fontsize=9,
    )
    return figure


def write_plot(results: Record, path: Path) -> None:
    """Draws the results into a PNG; nothing without a sweep."""
    if any(record["points"] for record in results["records"]):
        write(draw(results), path)
