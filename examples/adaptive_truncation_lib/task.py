"""The copy task: say at each step what was seen a number of steps before."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import fastbptt

SYMBOLS = 6
STEPS, BATCH = 60, 16
LAYERS, HIDDEN = 2, 50
CHANCE = 1.7918  # log of the number of symbols: the loss of one who guesses


@dataclass(frozen=True)
class CopyTask:
    """Each sequence has a lag of its own, from the shortest to the longest: an input says which."""

    shortest: int
    longest: int

    @property
    def name(self) -> str:
        """As it is called in tables."""
        to = f" to {self.longest}" if self.longest > self.shortest else ""
        return f"lag {self.shortest}{to}"

    @property
    def lags(self) -> int:
        """How many there are."""
        return self.longest - self.shortest + 1

    @property
    def inputs(self) -> int:
        """The number of inputs: one for each symbol, and for each lag if there are several."""
        return SYMBOLS + self.lags * (self.lags > 1)

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs [STEPS, batch, inputs], and the symbols to be said from step `longest` on."""
        symbols = torch.randint(SYMBOLS, (STEPS, batch), generator=generator)
        inputs = one_hot(symbols, SYMBOLS).float()
        if self.lags == 1:
            return inputs, symbols[: -self.longest]
        lags = torch.randint(self.lags, (batch,), generator=generator)
        told = one_hot(lags, self.lags).float().expand(STEPS, -1, -1)
        seen = torch.arange(self.longest, STEPS)[:, None] - (self.shortest + lags)
        return torch.cat([inputs, told], dim=-1), symbols.gather(0, seen)


TASKS = {task.name: task for task in (CopyTask(10, 10), CopyTask(5, 10))}


class Copier(nn.Module):
    """An LSTM of two layers, and a readout of its output."""

    def __init__(self, task: CopyTask) -> None:
        super().__init__()
        self.task = task
        self.recurrent = fastbptt.LSTM(task.inputs, HIDDEN, num_layers=LAYERS)
        self.readout = nn.Linear(HIDDEN, SYMBOLS)

    def loss_of_output(self, output: Tensor, target: Tensor) -> Tensor:
        """The cross entropy of the recurrent layers' output [STEPS, batch, HIDDEN]."""
        said = self.readout(output[self.task.longest :])
        return cross_entropy(said.flatten(0, 1), target.flatten())

    def loss(self, inputs: Tensor, target: Tensor, **options: object) -> Tensor:
        """The cross entropy; `options` are those of the recurrent layers' call."""
        return self.loss_of_output(self.recurrent(inputs, **options)[0], target)
