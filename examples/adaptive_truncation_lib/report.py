"""The table."""

import itertools
from collections.abc import Sequence

from shared_lib.tables import markdown

from .task import TASKS
from .training import SETTINGS, Run, cost_of, tolerance_of

HEAD = (
    "task",
    "setting",
    "final loss",
    "K: first, last",
    "cost",
    "of K = 30's",
    "bias within tolerance",
)


def rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """The head, and a row a task and setting: means over the seeds."""
    found = [HEAD]
    for task, setting in itertools.product(TASKS, SETTINGS):
        of = [run for run in runs if (run.task, run.setting) == (task, setting)]
        if not of:
            continue
        finals = [run.final for run in of]
        spread = f" ({min(finals):.3f} to {max(finals):.3f})" if len(of) > 1 else ""
        loss = f"{sum(finals) / len(of):.3f}{spread}"
        chosen, within = "", ""
        if (tolerance := tolerance_of(setting)) is not None:
            chosen = ", ".join(f"{run.chosen[0][1]} to {run.chosen[-1][1]}" for run in of)
            biases = [bias for run in of for _, bias in run.checks]
            within = f"{sum(bias <= tolerance for bias in biases)} of {len(biases)}"
        cost = sum(run.cost / len(run.losses) for run in of) / len(of)
        costs = (f"{cost:.0f}", f"{cost / cost_of(30):.0%}")
        found.append((task, setting, loss, chosen, *costs, within))
    return found


def table(runs: Sequence[Run]) -> str:
    """In Markdown."""
    return markdown(rows(runs))
