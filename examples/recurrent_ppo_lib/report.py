"""What a finished run shows: a table of the backends, and their learning curves."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is drawn: no display is needed
import matplotlib.pyplot as plt  # noqa: E402  (the line above has to come first)

from shared_lib.tables import markdown  # noqa: E402

from .tasks import TASKS  # noqa: E402
from .training import THRESHOLD, WINDOW, Trainer  # noqa: E402

COLUMNS = (
    "backend",
    "mean return",
    "updates to threshold",
    "core in training, s",
    "whole run, s",
)


def table(runs: list[Trainer]) -> str:
    """The runs side by side as a Markdown table; of two, the last row has the ratios."""
    rows = [COLUMNS]
    for run in runs:
        progress = run.progress
        rows.append(
            (
                run.backend,
                f"{progress.mean_return[-1]:.3f}",
                "not reached" if progress.solved is None else f"{progress.solved}",
                f"{run.core_seconds:.2f}",
                f"{progress.seconds[-1]:.2f}",
            )
        )
    if len(runs) == 2:
        first, second = runs
        core = first.core_seconds / second.core_seconds
        whole = first.progress.seconds[-1] / second.progress.seconds[-1]
        rows.append(
            (f"{first.backend} / {second.backend}", "", "", f"{core:.2f}x", f"{whole:.2f}x")
        )
    return markdown(rows)


def agreement(first: Trainer, second: Trainer) -> tuple[int, float]:
    """How long two runs stay together.

    Returns:
        The number of updates at the start in which the same episodes ended with the same returns,
        and the largest difference between the two runs' losses in those.
    """
    a, b = first.progress, second.progress
    same = 0
    while same < len(a.returns) and a.returns[same] == b.returns[same]:
        same += 1
    differences = (abs(x - y) for x, y in zip(a.losses[:same], b.losses[:same], strict=True))
    return same, max(differences, default=0.0)


def plot(runs: list[Trainer], path: Path) -> None:
    """Draw every run's mean return over its updates, and over the time they took."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for run, width in zip(runs, (5, 1.5)[-len(runs) :], strict=True):
        progress = run.progress
        updates = range(1, len(progress.losses) + 1)
        # The first run's line is wide and pale, so that an equal curve shows on top of it.
        pale = {"alpha": 0.5} if width > 2 else {}
        left.plot(updates, progress.mean_return, label=run.backend, linewidth=width, **pale)
        (line,) = right.plot(progress.seconds, progress.mean_return, label=run.backend)
        if progress.solved is not None:
            seconds = progress.seconds[progress.solved - 1]
            right.axvline(seconds, color=line.get_color(), linewidth=0.8)
            right.annotate(
                f" {seconds:.1f} s",
                (seconds, 0.02),
                xycoords=right.get_xaxis_transform(),
                color=line.get_color(),
            )
    without_memory = TASKS[runs[0].args.task].best_without_memory
    for axes in (left, right):
        axes.axhline(THRESHOLD, color="gray", linestyle="--", label=f"threshold, {THRESHOLD}")
        axes.axhline(without_memory, color="gray", linestyle=":", label="best without memory")
    left.set(xlabel="update", ylabel=f"mean return of the last {WINDOW} episodes")
    right.set(xlabel="seconds, acting and training")
    right.set_xlim(left=0)
    left.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)
