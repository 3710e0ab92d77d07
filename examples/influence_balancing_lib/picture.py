"""The influence, and the losses of both ways to learn, in one figure."""

from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")  # a file is drawn: no display is needed
from matplotlib.axes import Axes  # noqa: E402  (the line above has to come first)
from matplotlib.figure import Figure  # noqa: E402

from .chain import RANDOM, WINDOWS  # noqa: E402

COLOURS = ("#c2402a", "#e8a33d", "#8a6d3b", "#7a3e9d", "#2c7fc9", "black")

Curves = Mapping[str, Sequence[Sequence[float]]]  # pairs of an update and its loss


def draw(influences: Sequence[float], windows: Curves, segments: Mapping[str, Curves]) -> Figure:
    """Four panels.

    Args:
        influences: for K = 1, 2, ...
        windows: losses over the updates, by K.
        segments: losses over the updates, by learning rate and then truncation.
    """
    figure = Figure(figsize=(15, 3.8), layout="constrained")
    first, second, *rest = figure.subplots(1, 2 + len(segments))
    lags = range(1, len(influences) + 1)
    first.plot(lags, influences, color="black")
    first.plot(WINDOWS, [influences[k - 1] for k in WINDOWS], "o", color="#c2402a", markersize=5)
    first.axhline(0, color="gray", linestyle=":", linewidth=1)
    first.set(xlabel="K, steps back", ylabel="influence of theta", title="what K steps believe")
    _losses(second, windows, "windows of K steps")
    for axes, (rate, curves) in zip(rest, segments.items(), strict=True):
        _losses(axes, curves, f"segments of 200, rate {rate}")
    return figure


def _losses(axes: Axes, curves: Curves, title: str) -> None:
    names = list(dict.fromkeys(name.partition("#")[0] for name in curves))
    seen = set()
    for label, losses in curves.items():
        name = label.partition("#")[0]  # of a random one there are several runs
        axes.plot(
            *zip(*losses, strict=True),
            color=COLOURS[names.index(name)],
            linewidth=0.8 if name == RANDOM else 1.5,
            label=None if name in seen else name,
        )
        seen.add(name)
    axes.set(xlabel="update", ylabel="loss", title=title, yscale="log", ylim=(1e-12, 1e7))
    axes.legend(fontsize=7.5)
