"""Learning curves, the chosen K, and the bias against the tolerance, in one figure."""

from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")  # a file is drawn: no display is needed
from matplotlib.axes import Axes  # noqa: E402  (the line above has to come first)
from matplotlib.figure import Figure  # noqa: E402

from .task import CHANCE, TASKS  # noqa: E402
from .training import AT_ONCE, SETTINGS, Run, tolerance_of  # noqa: E402

BLUES = ("#b9d6f0", "#7fb3e6", "#2c7fc9", "#17558f", "#0b3c6f")
REDS = ("#e8a33d", "#c2402a", "#7a1d10")
COLOURS = dict(zip(SETTINGS, (*BLUES, *REDS, *REDS), strict=True))
SMOOTH = 20  # updates


def draw(runs: Sequence[Run]) -> Figure:
    """Three panels a task."""
    tasks = [task for task in TASKS if any(run.task == task for run in runs)]
    figure = Figure(figsize=(14, 4 * len(tasks)), layout="constrained")
    for task, row in zip(tasks, figure.subplots(len(tasks), 3, squeeze=False), strict=True):
        _draw_task([run for run in runs if run.task == task], *row)
    return figure


def _draw_task(runs: Sequence[Run], curves: Axes, chosen: Axes, bias: Axes) -> None:
    seen: set[str] = set()
    for run in runs:
        line = ":" if run.setting.endswith(AT_ONCE) else "-"
        style = {"color": COLOURS[run.setting], "linewidth": 1.3, "linestyle": line}
        label = None if run.setting in seen else run.setting
        seen.add(run.setting)
        smooth = [
            sum(run.losses[i : i + SMOOTH]) / len(run.losses[i : i + SMOOTH])
            for i in range(0, len(run.losses), SMOOTH)
        ]
        curves.plot(range(0, len(run.losses), SMOOTH), smooth, label=label, **style)
        if run.chosen:
            updates, ks, _ = zip(*run.chosen, strict=True)
            chosen.step(updates, ks, where="post", label=label, **style)
            updates, biases = zip(*run.checks, strict=True)
            relative = [each / tolerance_of(run.setting) for each in biases]
            bias.plot(updates, relative, marker=".", label=label, **style)
    curves.axhline(CHANCE, color="gray", linestyle=":", linewidth=1)
    curves.set(yscale="log", ylabel="loss", title=f"copy task, {runs[0].task}")
    chosen.set(ylabel="K", title="chosen truncation")
    bias.axhline(1, color="gray", linestyle=":", linewidth=1)
    bias.set(ylabel="relative bias / tolerance", title="measured bias", ylim=(0, None))
    for axes in (curves, chosen, bias):
        _finish(axes)


def _finish(axes: Axes) -> None:
    axes.set_xlabel("update")
    axes.legend(fontsize=8)
