"""The three parts in one figure."""

from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file is drawn: no display is needed
from matplotlib.axes import Axes  # noqa: E402  (the line above has to come first)
from matplotlib.axis import Axis  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter  # noqa: E402

from .bias import Bias  # noqa: E402
from .cost import Cost  # noqa: E402
from .problem import LEARNT, LOSSES, VARIANCE  # noqa: E402
from .training import Run  # noqa: E402

Style = dict[str, Any]

# One style a mode, in the order of `modes`. Of lines that coincide, the narrow are on top.
STYLES: tuple[Style, ...] = (
    {"color": "black", "linewidth": 1.6},
    {"color": "#7fb3e6", "linewidth": 6},
    {"color": "#2c7fc9", "linewidth": 3.2},
    {"color": "#0b3c6f", "linewidth": 1.2},
    {"color": "#e8a33d", "linewidth": 1.6},
    {"color": "#e8a33d", "linewidth": 1.6, "linestyle": (0, (4, 1.5))},
    {"color": "#c2402a", "linewidth": 1.6},
    {"color": "#c2402a", "linewidth": 1.6, "linestyle": (0, (4, 1.5))},
)
MARKERS = "osD^vP*X"
TITLES = {"last": "loss at the last step", "every": "loss at every step"}


def draw(biases: Sequence[Bias], runs: Sequence[Run], costs: Sequence[Cost], title: str) -> Figure:
    """Learning curves above; below, bias against deviation for each loss, and cost."""
    modes = list(dict.fromkeys(run.mode for run in runs))
    styles = dict(zip(modes, STYLES, strict=True))
    lengths = list(dict.fromkeys(run.steps for run in runs))
    figure = Figure(figsize=(max(14.0, 4.2 * len(lengths)), 12), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    above, below = figure.subfigures(2, 1, height_ratios=(1.4, 1))

    panels = above.subplots(len(LOSSES), len(lengths), squeeze=False, sharey=True)
    for row, loss in zip(panels, LOSSES, strict=True):
        for axes, steps in zip(row, lengths, strict=True):
            here = [run for run in runs if run.loss == loss and run.steps == steps]
            _learning(axes, here, styles)
            axes.set_title(f"learning: T = {steps}, {TITLES[loss]}", fontsize=11)
        row[0].set_ylabel("held-out error")
    for axes in panels[-1]:
        axes.set_xlabel("training step")

    *scatter, bars = below.subplots(1, len(LOSSES) + 1)
    for axes, loss in zip(scatter, LOSSES, strict=True):
        halfway = [one for one in biases if one.loss == loss and one.weights == "halfway"]
        _bias(axes, halfway, styles, lengths)
        axes.set_title(f"gradient: {TITLES[loss]}", fontsize=11)
    _cost(bars, costs, styles, lengths)
    bars.set_title("cost", fontsize=11)
    handles = [Line2D([], [], label=mode, **style) for mode, style in styles.items()]
    handles += [
        Line2D([], [], linestyle="", marker=marker, color="gray", label=f"T = {steps}")
        for steps, marker in zip(lengths, MARKERS, strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    return figure


def _learning(axes: Axes, runs: Sequence[Run], styles: dict[str, Style]) -> None:
    """The held-out error over the steps, with a dot where the problem was learnt."""
    for run in runs:
        steps, errors = zip(*run.curve, strict=True)
        axes.plot(steps, errors, **styles[run.mode])
        if run.reached:
            axes.plot(steps[-1], errors[-1], "o", color=styles[run.mode]["color"], markersize=5)
    for error, name, side, x in (
        (VARIANCE, "always answers 1", "bottom", 0.99),
        (LEARNT, "learnt", "top", 0.01),
    ):
        axes.axhline(error, color="gray", linestyle=":", linewidth=1)
        axes.annotate(
            name,
            (x, error),
            xytext=(0, 4 if side == "bottom" else -4),
            textcoords="offset points",
            xycoords=axes.get_yaxis_transform(),
            ha="right" if x > 0.5 else "left",
            va=side,
            fontsize=8.5,
            color="#555555",
        )
    axes.set_yscale("log")
    axes.set_ylim(0.007, 0.5)
    axes.set_xlim(0, max(run.curve[-1][0] for run in runs) * 1.02)
    _plain_ticks(axes.yaxis)


def _bias(
    axes: Axes, biases: Sequence[Bias], styles: dict[str, Style], lengths: Sequence[int]
) -> None:
    """A point a mode and length, with the error of its bias; halfway through training."""
    for one in biases:
        style = styles[one.mode]
        axes.errorbar(
            one.deviation,
            one.bias,
            yerr=one.error,
            color=style["color"],
            marker=MARKERS[lengths.index(one.steps) % len(MARKERS)],
            markersize=min(11, 6.5 + style["linewidth"]),  # of points that coincide too
            markerfacecolor="white" if "linestyle" in style else style["color"],
            linewidth=1,
        )
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis)
    axes.set_ylim(-0.06, min(2.5, max(1.1, 1.05 * max(one.bias + one.error for one in biases))))
    axes.set(xlabel="deviation of a gradient / norm of full's", ylabel="bias / norm of full's")
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)


def _cost(
    axes: Axes, costs: Sequence[Cost], styles: dict[str, Style], lengths: Sequence[int]
) -> None:
    """For each length a group of bars, one a mode."""
    modes = list(styles)
    for one in costs:
        place = lengths.index(one.steps) + (modes.index(one.mode) - (len(modes) - 1) / 2) * 0.11
        hatched = "linestyle" in styles[one.mode]
        colour = styles[one.mode]["color"]
        axes.bar(
            place,
            one.ratio,
            width=0.095,
            facecolor="white" if hatched else colour,
            edgecolor=colour,
            hatch="////" if hatched else None,
        )
        axes.annotate(
            f"{one.ratio:.1f}",
            (place, one.ratio),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            rotation=90,
            fontsize=7,
        )
    axes.axhline(1, color="gray", linestyle=":", linewidth=1)
    axes.margins(y=0.12)
    axes.set_xticks(range(len(lengths)), [f"T = {steps}" for steps in lengths])
    axes.set_ylabel("time of a training step / full's")


def _plain_ticks(axis: Axis) -> None:
    """Numbers as they are said, at 1, 2 and 5 of each decade."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
