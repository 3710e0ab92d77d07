"""The copy task: say at each step what was seen a number of steps before."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import fastbptt

LAG, SYMBOLS = 10, 6
STEPS, BATCH = 60, 16
LAYERS, HIDDEN = 2, 50
CHANCE = 1.7918  # log of the number of symbols: the loss of one who guesses


def draw(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs [STEPS, batch, SYMBOLS], and the symbols to be said from step LAG on."""
    symbols = torch.randint(SYMBOLS, (STEPS, batch), generator=generator)
    return one_hot(symbols, SYMBOLS).float(), symbols[:-LAG]


class Copier(nn.Module):
    """An LSTM of two layers, and a readout of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = fastbptt.LSTM(SYMBOLS, HIDDEN, num_layers=LAYERS)
        self.readout = nn.Linear(HIDDEN, SYMBOLS)

    def loss_of_output(self, output: Tensor, target: Tensor) -> Tensor:
        """The cross entropy of the recurrent layers' output [STEPS, batch, HIDDEN]."""
        return cross_entropy(self.readout(output[LAG:]).flatten(0, 1), target.flatten())

    def loss(self, inputs: Tensor, target: Tensor, **options: object) -> Tensor:
        """The cross entropy; `options` are those of the recurrent layers' call."""
        return self.loss_of_output(self.recurrent(inputs, **options)[0], target)
