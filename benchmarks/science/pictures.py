"""The pictures of those experiments that are no example."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")  # a file is drawn: no display is needed
from matplotlib.figure import Figure  # noqa: E402  (the line above has to come first)

from ..common.files import Record  # noqa: E402
from .records import by_mode, chunk_name  # noqa: E402

COLOURS = ("black", "#7fb3e6", "#e8a33d", "#e8a33d", "#c2402a", "#c2402a")
DISTANCES = ("#9aa5b1", "#7fb3e6", "#2c7fc9", "#0b3c6f", "#e8a33d", "#c2402a")
STYLES = ("-", "-", "-", "--", "-", "--")  # dashed: the same with a draw for each sequence


def characters(records: Sequence[Record]) -> Figure:
    """Held-out bits over the updates, the mean over the seeds; and every seed's end."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    curves, ends = figure.subplots(1, 2, width_ratios=(1.4, 1))
    modes = by_mode(records)
    for number, (mode, of) in enumerate(modes.items()):
        updates = [update for update, _ in of[0]["curve"]]
        means = [
            statistics.fmean(r["curve"][place][1] for r in of) for place in range(len(updates))
        ]
        style = {"color": COLOURS[number], "linestyle": STYLES[number]}
        curves.plot(updates, means, label=mode, **style)
        ends.plot([r["bits"] for r in of], [-number] * len(of), "o", color=COLOURS[number])
    curves.set(xlabel="update", ylabel="held-out bits a character")
    curves.legend(fontsize=8)
    ends.set_yticks([-number for number in range(len(modes))], list(modes), fontsize=8)
    ends.set(xlabel="bits at the end, a point a seed")
    return figure


def oracle(records: Sequence[Record]) -> Figure:
    """The relative bias over the updates, the mean over the seeds; None's would be on the axis."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    modes = {mode: of for mode, of in by_mode(records).items() if mode != "None"}
    for colour, (mode, of) in zip(DISTANCES, modes.items(), strict=True):
        updates = [check["update"] for check in of[0]["checks"]]
        means, errors = (
            [statistics.fmean(r["checks"][i].get(name, 0) for r in of) for i in range(len(updates))]
            for name in ("bias", "error")
        )
        axes.plot(updates, means, ".-", label=mode, color=colour)
        if any(errors):
            axes.plot(updates, errors, ":", color=colour, linewidth=1)
    axes.set(xlabel="update", ylabel="relative distance to the tangents' gradient", ylim=(0, None))
    axes.set_title("dotted: what the number of draws alone makes of no bias", fontsize=9)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def ppo(records: Sequence[Record]) -> Figure:
    """The mean return over the updates: a panel a task and cell, a line a run."""
    runs = [record for record in records if record["kind"] == "returns"]
    cells, tasks, chunks = (
        list(dict.fromkeys(record[name] for record in runs)) for name in ("cell", "task", "chunk")
    )
    figure = Figure(figsize=(4 * len(tasks), 3 * len(cells)), layout="constrained")
    panels = figure.subplots(len(cells), len(tasks), sharex="col", sharey=True, squeeze=False)
    for row, cell in zip(panels, cells, strict=True):
        for axes, task in zip(row, tasks, strict=True):
            for record in (r for r in runs if (r["cell"], r["task"]) == (cell, task)):
                number = chunks.index(record["chunk"])
                name = chunk_name(record["chunk"]) if record["seed"] == 0 else ""
                colour = ("#c2402a", "#e8a33d", "#2c7fc9", "black")[number]
                axes.plot(record["returns"], color=colour, linewidth=1, label=name)
            axes.set_title(f"{task}, {cell.upper()}", fontsize=10)
    panels[0][0].legend(fontsize=8)
    figure.supxlabel("update")
    figure.supylabel("mean return of 100 episodes")
    return figure
