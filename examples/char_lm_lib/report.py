"""What a finished run shows: a table of the backends, and their loss curves."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is drawn: no display is needed
import matplotlib.pyplot as plt  # noqa: E402  (the line above has to come first)

from shared_lib.tables import markdown  # noqa: E402

from .training import Trainer  # noqa: E402

COLUMNS = (
    "backend",
    "held-out perplexity",
    "layer forward, s",
    "layer backward, s",
    "layer, s",
    "whole run, s",
)


def numbers(trainer: Trainer) -> list[float]:
    """One row of the table: the columns after the first."""
    progress = trainer.progress
    layer = progress.forward_seconds + progress.backward_seconds
    return [
        progress.held_out[-1][1],
        progress.forward_seconds,
        progress.backward_seconds,
        layer,
        progress.seconds,
    ]


def table(torch_run: Trainer, our_run: Trainer) -> str:
    """The two runs side by side as a Markdown table, with the ratios in the last row."""
    theirs, ours = numbers(torch_run), numbers(our_run)
    ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
    rows = [
        COLUMNS,
        (torch_run.backend, f"{theirs[0]:.3f}", *(f"{seconds:.2f}" for seconds in theirs[1:])),
        (our_run.backend, f"{ours[0]:.3f}", *(f"{seconds:.2f}" for seconds in ours[1:])),
        ("torch / fastbptt", f"{ratios[0]:.4f}", *(f"{ratio:.2f}x" for ratio in ratios[1:])),
    ]
    return markdown(rows)


def plot(runs: list[Trainer], unigram: float, path: Path) -> None:
    """Draw training loss and held-out perplexity of every run over the optimizer steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for run, width in zip(runs, (4, 1)[-len(runs) :], strict=True):
        # The first run's line is wide and pale, so that an equal curve shows on top of it.
        style = {"label": run.backend, "linewidth": width, "alpha": 1 / width**0.5}
        left.plot(range(1, run.progress.step + 1), run.progress.losses, **style)
        right.plot(*zip(*run.progress.held_out, strict=True), marker="o", **style)
    right.axhline(unigram, color="gray", linestyle=":", label="unigram model")
    left.set(xlabel="step", ylabel="training loss, nats per character")
    right.set(xlabel="step", ylabel="held-out perplexity", ylim=(0, None))
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
