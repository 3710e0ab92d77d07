"""Learning curves, the chosen K, and the bias against the tolerance, in one figure."""

from collections.abc import Sequence
from statistics import fmean

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
    """Three panels a task, a line a setting: the mean over its seeds."""
    tasks = [task for task in TASKS if any(run.task == task for run in runs)]
    figure = Figure(figsize=(14, 4 * len(tasks)), layout="constrained")
    for task, row in zip(tasks, figure.subplots(len(tasks), 3, squeeze=False), strict=True):
        _draw_task([run for run in runs if run.task == task], *row)
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _draw_task(runs: Sequence[Run], curves: Axes, chosen: Axes, bias: Axes) -> None:
    for setting in SETTINGS:
        of = [run for run in runs if run.setting == setting]
        if not of:
            continue
        line = ":" if setting.endswith(AT_ONCE) else "-"
        style = {"label": setting, "color": COLOURS[setting], "linewidth": 1.3, "linestyle": line}
        losses = _mean([run.losses for run in of])
        smooth = [fmean(losses[i : i + SMOOTH]) for i in range(0, len(losses), SMOOTH)]
        curves.plot(range(0, len(losses), SMOOTH), smooth, **style)
        if of[0].chosen:
            updates, *_ = zip(*of[0].chosen, strict=True)
            ks = _mean([[k for _, k, _ in run.chosen] for run in of])
            chosen.step(updates, ks, where="post", **style)
            updates, _ = zip(*of[0].checks, strict=True)
            biases = _mean([[each for _, each in run.checks] for run in of])
            relative = [each / tolerance_of(setting) for each in biases]
            bias.plot(updates, relative, marker=".", **style)
    seeds = len({run.seed for run in runs})
    task = runs[0].task if seeds == 1 else f"{runs[0].task}, means over {seeds} seeds"
    curves.axhline(CHANCE, color="gray", linestyle=":", linewidth=1)
    curves.set(yscale="log", ylabel="loss", title=f"copy task, {task}")
    chosen.set(ylabel="K", title="chosen truncation")
    bias.axhline(1, color="gray", linestyle=":", linewidth=1)
    bias.set(ylabel="relative bias / tolerance", title="measured bias", ylim=(0, None))
    for axes in (curves, chosen, bias):
        axes.set_xlabel("update")


def _mean(of_runs: Sequence[Sequence[float]]) -> list[float]:
    """At each place, over the runs."""
    return [fmean(values) for values in zip(*of_runs, strict=True)]
