"""One training run: the same weights and sequences for every truncation."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from shared_lib.progress import progress

from .modes import Modes
from .problem import LEARNT, VARIANCE, Adder, draw, held_out_error, loss_of

HELD_OUT = 1000  # sequences
EVALUATE_EVERY = 10  # steps


@dataclass(frozen=True)
class Settings:
    """What all the runs of the program have in common."""

    cell: str
    hidden: int
    batch: int
    lr: float
    max_steps: int
    seed: int


@dataclass
class Run:
    """What one training run has shown."""

    steps: int  # T, of the sequences
    loss: str
    mode: str
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, held-out error)
    start: dict[str, Tensor] = field(default_factory=dict, repr=False)  # weights before training
    halfway: dict[str, Tensor] = field(default_factory=dict, repr=False)  # see `train`
    halfway_error: float = math.nan

    @property
    def reached(self) -> int | None:
        """The step at which the problem counted as learnt."""
        step, error = self.curve[-1]
        return step if error < LEARNT else None


def train(settings: Settings, modes: Modes, mode: str, steps: int, loss: str) -> Run:
    """Train until the problem counts as learnt, or `settings.max_steps` are done.

    The run keeps the weights it began with, and those that first brought the held-out error below
    half the variance of the answer (if none did, those of its end).
    """
    torch.manual_seed(settings.seed)
    model = Adder(settings.cell, settings.hidden, steps)
    sequences = torch.Generator().manual_seed(settings.seed)
    held_out = draw(steps, HELD_OUT, sequences)
    truncation = modes[mode](settings.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)

    run = Run(steps, loss, mode, [(0, held_out_error(model, *held_out))], _copy(model))
    bar = progress(
        range(1, settings.max_steps + 1),
        desc=f"T = {steps}, loss {loss}: {mode}",
    )
    with bar:
        for step in bar:
            inputs, targets = draw(steps, settings.batch, sequences)
            optimizer.zero_grad()
            loss_of(model(inputs, truncation), targets, loss).backward()
            norm = clip_grad_norm_(model.parameters(), max_norm=1.0)
            finite = bool(norm.isfinite())
            if finite:
                optimizer.step()
            if step % EVALUATE_EVERY == 0 or step == settings.max_steps or not finite:
                error = held_out_error(model, *held_out) if finite else math.nan
                run.curve.append((step, error))
                bar.set_postfix(error=f"{error:.4f}", refresh=False)
                if not run.halfway and error < VARIANCE / 2:
                    run.halfway, run.halfway_error = _copy(model), error
                if error < LEARNT or not finite:
                    break
    if not run.halfway:
        run.halfway, run.halfway_error = _copy(model), run.curve[-1][1]
    return run


def _copy(model: Adder) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}
