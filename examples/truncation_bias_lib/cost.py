"""What a step of training takes with each truncation."""

import statistics
import time
from dataclasses import dataclass

import torch

from shared_lib.progress import progress

from .modes import FULL, Modes
from .problem import Adder, draw, loss_of
from .training import Settings


@dataclass(frozen=True)
class Cost:
    """The time of a training step of one truncation."""

    steps: int  # T, of the sequences
    mode: str
    seconds: float  # the median
    ratio: float  # to full backpropagation in the same round, the median


def measure(settings: Settings, modes: Modes, steps: int, rounds: int) -> list[Cost]:
    """Time every mode once a round, in turn: whatever else the machine does slows all of them.

    A training step is a forward pass, a backward pass and a step of the optimizer. Its time does
    not depend on where the loss is.
    """
    torch.manual_seed(settings.seed)
    model = Adder(settings.cell, settings.hidden, steps)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    inputs, targets = draw(steps, settings.batch, torch.Generator().manual_seed(settings.seed))
    truncations = {mode: make(settings.seed) for mode, make in modes.items()}
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    for round_ in progress(range(rounds + 1), desc=f"T = {steps}: cost", unit="round"):
        for mode, truncation in truncations.items():
            begun = time.perf_counter()
            optimizer.zero_grad()
            loss_of(model(inputs, truncation), targets, "every").backward()
            optimizer.step()
            if round_ > 0:  # the first round warms up
                seconds[mode].append(time.perf_counter() - begun)
    return [
        Cost(
            steps,
            mode,
            statistics.median(times),
            statistics.median(t / f for t, f in zip(times, seconds[FULL], strict=True)),
        )
        for mode, times in seconds.items()
    ]
