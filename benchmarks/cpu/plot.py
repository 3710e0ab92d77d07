"""The comparison as a picture: speedups over the peers by B and H, and our share of the bound."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter

from ..common.contenders import TORCH
from ..common.rows import BACKWARD, FORWARD
from ..common.workload import CELLS
from . import compiled_loop, jax_scan, onnx_runtime, torchrl_module
from .bound import CACHE, LARGE, PEAK
from .figures import BAD, BAND, COLOURS, FAINT, INK, LINES, tidy, title, write
from .peers import COMPILE, JAX, ONNX, OPTIONAL, TORCHRL
from .results import Record
from .tables import machine_line

LOOP = "loop"
_LABELS = {
    TORCH: "torch.nn",
    JAX: jax_scan.LABEL,
    COMPILE: compiled_loop.LABEL,
    LOOP: "a loop by hand",
    ONNX: onnx_runtime.LABEL,
    TORCHRL: torchrl_module.LABEL,
}
# The sixth colour is a bound's.
_STYLES = dict(zip(_LABELS, zip((*COLOURS[:5], "#7a5c2e"), "osD^v<", strict=True), strict=True))
_BOUNDS = {
    PEAK: ("#aeb8c2", "products at the FMA peak"),
    LARGE: ("#aeb8c2", "products as a large sgemm"),
    CACHE: (COLOURS[5], "W_hh once a step"),
}
_TICKS = (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_ROOM = 1.25  # free space below and above, a factor


def _kind(peer: str) -> str:
    """What peers of several cells and rows have in common."""
    if peer.startswith("torch.nn."):
        return TORCH
    others = {module.LABEL: kind for kind, module in OPTIONAL.items()}
    return others.get(peer, LOOP)


def _is_plain(record: Record) -> bool:
    return record["truncation"] is None and not record["resets"]


def _places(records: Sequence[Record]) -> dict[str, Record]:
    """A record of each row, in the order of the x axis: plain ones by B, H and T."""
    rows = {record["row"]: record for record in records}
    if not all(map(_is_plain, rows.values())):
        return rows
    return dict(sorted(rows.items(), key=lambda item: [item[1]["size"][a] for a in "BHT"]))


def _tick(record: Record) -> str:
    """H over T; of the others what they are, and their size."""
    size = record["size"]
    if _is_plain(record):
        return f"{size['H']}\n{size['T']}"
    name, _, numbers = (record["truncation"] or "resets").partition("(")
    numbers = ", ".join(part.partition("=")[2] for part in numbers.rstrip(")").split(", "))
    return f"{name} {numbers}\nT {size['T']}\nB {size['B']}, H {size['H']}"


def _frame(axes: Axes, places: dict[str, Record], *, with_ticks: bool) -> None:
    """A band and a heading for each B, and the rows' names where wanted."""
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.xaxis.set_major_locator(FixedLocator(range(len(places))))
    axes.set_xticklabels([_tick(r) if with_ticks else "" for r in places.values()])
    axes.grid(axis="y", color=LINES, lw=0.7)
    tidy(axes)
    batches = [record["size"]["B"] for record in places.values()]
    plain = all(map(_is_plain, places.values()))
    groups = dict.fromkeys(batches) if plain else range(len(places))
    for i, group in enumerate(groups):
        at = [x for x, B in enumerate(batches) if B == group] if plain else [group]
        if i % 2 == 0:
            axes.axvspan(at[0] - 0.5, at[-1] + 0.5, color=BAND, lw=0, zorder=0)
        if plain:
            axes.text(
                (at[0] + at[-1]) / 2,
                0.985,
                f"B {group}",
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=8.5,
                weight="bold",
                color=FAINT,
            )


def _failed(axes: Axes, x: float) -> None:
    style = {"fontsize": 9, "weight": "bold", "color": BAD, "rotation": 90}
    where = axes.get_xaxis_transform()
    axes.text(x, 0.5, "FAILED", transform=where, ha="center", va="center", **style)


def _speedups(axes: Axes, places: dict[str, Record], records: Sequence[Record]) -> None:
    """A mark a row, peer and mode: the median, and for the detailed mode its quartiles."""
    axes.set_yscale("log")
    axes.axhline(1, color=INK, lw=1.2, zorder=1)
    order = {row: x for x, row in enumerate(places)}
    kinds = list(dict.fromkeys(_kind(p) for r in records for p in r.get("speedup", ())))
    kinds.sort(key=list(_LABELS).index)
    for record in records:
        if record["error"] is not None:
            _failed(axes, order[record["row"]])
            continue
        for peer, ratio in record["speedup"].items():
            colour, marker = _STYLES[_kind(peer)]
            x = order[record["row"]] + (kinds.index(_kind(peer)) - (len(kinds) - 1) / 2) * 0.24
            if record["mode"] == FORWARD:
                axes.plot(x, ratio["median"], marker, ms=4.5, color="white", mec=colour, mew=1.2)
                continue
            axes.plot([x, x], [1, ratio["median"]], color=colour, lw=3, alpha=0.25, zorder=1.5)
            axes.plot([x, x], [ratio["q1"], ratio["q3"]], color=colour, lw=1.5)
            axes.plot(x, ratio["median"], marker, ms=6.5, color=colour, mec="white", mew=0.7)


def _means(records: Sequence[Record]) -> str:
    """The geometric means over the rows of the panel, in forward+backward where it is there."""
    mode = BACKWARD if any(r["mode"] == BACKWARD for r in records) else FORWARD
    medians: dict[str, list[float]] = {}
    for record in records:
        if record["mode"] == mode:
            for peer, ratio in record.get("speedup", {}).items():
                medians.setdefault(_kind(peer), []).append(ratio["median"])
    names = _LABELS | {COMPILE: "compile", JAX: "JAX", ONNX: "ONNX", LOOP: "by hand"}
    return "geometric mean " + ", ".join(
        f"{statistics.geometric_mean(medians[kind]):.1f}× {names[kind]}"
        for kind in _LABELS
        if kind in medians
    )


def _shares(axes: Axes, places: dict[str, Record], records: Sequence[Record]) -> None:
    """A bar a row: the share of the bound in forward+backward, and a mark for forward."""
    order = {row: x for x, row in enumerate(places)}
    axes.axhline(1, color=INK, lw=1.2, zorder=3)
    for record in records:
        if record["error"] is not None:
            continue
        x, share = order[record["row"]], record["bound"]["share"]
        if record["mode"] == FORWARD:
            axes.plot(x, share["median"], "o", ms=4.5, color="white", mec=INK, mew=1.1, zorder=5)
            continue
        axes.bar(x, share["median"], 0.62, color=_BOUNDS[record["bound"]["by"]][0], zorder=2)
        axes.plot([x, x], [share["q1"], share["q3"]], color=INK, lw=1.5, zorder=4)
        text = f"{100 * share['median']:.0f}"
        axes.text(x, 0.03, text, ha="center", va="bottom", fontsize=8, color=INK, zorder=4)


def _marks(records: Sequence[Record]) -> list[Line2D | Patch]:
    """The legend's."""
    kinds = {_kind(peer) for r in records for peer in r.get("speedup", ())}
    bounds = {r["bound"]["by"] for r in records if r["error"] is None and r["mode"] == BACKWARD}
    marks: list[Line2D | Patch] = [
        Line2D([], [], color=colour, marker=marker, ms=6.5, lw=0, label=_LABELS[kind])
        for kind, (colour, marker) in _STYLES.items()
        if kind in kinds
    ]
    hollow = {"color": "white", "mec": INK, "mew": 1.1, "lw": 0}
    marks.append(Line2D([], [], marker="o", ms=4.5, **hollow, label="hollow: forward alone"))
    marks += [
        Patch(color=_BOUNDS[by][0], label=f"bound: {_BOUNDS[by][1]}")
        for by in _BOUNDS
        if by in bounds
    ]
    return marks


def draw(results: Record) -> Figure:
    """The figure of a comparison's results: a column a cell."""
    records = results["records"]
    cells = list(dict.fromkeys(r["cell"] for r in records))
    plain = [r for r in records if _is_plain(r)]
    cut = [r for r in records if not _is_plain(r)]
    parts = [(plain, _speedups, 3.4), (plain, _shares, 2.3), (cut, _speedups, 3.0)]
    parts = [part for part in parts if part[0]]
    columns = max(len(_places(chosen)) for chosen, *_ in parts)
    width = 1.0 + len(cells) * max(3.6, 0.42 * columns + 0.3)
    height = 1.5 + sum(inches for *_, inches in parts)
    figure = Figure(figsize=(max(width, 9.5), height), layout="constrained", dpi=120)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 1.05 / height), hspace=0.04)
    panels = figure.subplots(
        len(parts),
        len(cells),
        sharey="row",
        squeeze=False,
        height_ratios=[inches for *_, inches in parts],
    )
    for line, (chosen, paint, _) in zip(panels, parts, strict=True):
        places = _places(chosen)
        is_last_of_plain = chosen is cut or paint is _shares
        for axes, cell in zip(line, cells, strict=True):
            mine = [r for r in chosen if r["cell"] == cell]
            paint(axes, places, mine)
            _frame(axes, places, with_ticks=is_last_of_plain)
            if paint is _speedups:
                heading = _means(mine)
                axes.set_title(heading, fontsize=9, color=INK, loc="right", pad=5)
                name = CELLS[cell].label if chosen is parts[0][0] else ""
                axes.set_title(name, fontsize=13, weight="bold", color=INK, loc="left", pad=5)
        if paint is _speedups:
            _scale(line, chosen)
            what = "truncation and resets: " if chosen is cut else ""
            line[0].set_ylabel(f"{what}their time / ours", fontsize=9.5, color=INK)
        else:
            line[0].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f}%"))
            line[0].set_ylim(0, max(1.3, 1.15 * line[0].get_ylim()[1]))
            line[0].set_ylabel("share of the bound", fontsize=9.5, color=INK)
            beside = line[0].get_yaxis_transform()
            under = {"xytext": (0, -3.5), "textcoords": "offset points", "va": "top", "ha": "right"}
            line[0].annotate(
                "H\nT", (-0.015, 0), xycoords=beside, **under, fontsize=8.5, color=FAINT
            )

    names = ", ".join(CELLS[cell].label for cell in cells)
    title(figure, f"fastbptt {names}: speedup in forward+backward", machine_line(results))
    figure.legend(
        handles=_marks(records),
        loc="upper left",
        bbox_to_anchor=(0.004, 1 - 0.62 / height),
        ncols=5 if figure.get_size_inches()[0] < 12 else 9,
        frameon=False,
        fontsize=9,
        handletextpad=0.4,
        columnspacing=1.4,
    )
    return figure


def _scale(line: Sequence[Axes], records: Sequence[Record]) -> None:
    """The same logarithmic axis for a line of panels, with 1 in sight and room for the headings."""
    medians = [s["median"] for r in records for s in r.get("speedup", {}).values()] or [1.0]
    line[0].set_ylim(min(1.0, *medians) / _ROOM, max(1.5, *medians) * _ROOM**2)
    for axes in line:
        axes.yaxis.set_major_locator(FixedLocator(_TICKS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}×"))


def write_plot(results: Record, path: Path) -> None:
    """Draws a comparison's results into a PNG; nothing without records."""
    if results["records"]:
        write(draw(results), path)
