"""The adding problem, the model that learns it, and its loss."""

import torch
from torch import Tensor, nn

import fastbptt

# Of the sum of two uniform numbers: the error of one who always answers 1. Some papers say 0.1767.
VARIANCE = 1 / 6
LEARNT = 0.02  # held-out error below which the problem counts as learnt

CELLS = ("rnn", "gru", "lstm")
LEARNING_RATES = {"rnn": 2e-3, "gru": 1e-2, "lstm": 1e-2}

# Where the loss is: at the last step only, or at every step.
LOSSES = ("last", "every")


def draw(steps: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of the adding problem (Hochreiter and Schmidhuber, "Long short-term memory", 1997).

    Each step has a number, uniform in [0, 1), and a marker, which is 1 at two different steps of
    the sequence's first half and 0 at all others. To be told at the end is the sum of the two
    marked numbers: what matters lies between T / 2 and T - 1 steps back.

    Args:
        steps: T, at least 4.
        batch: B.
        generator: where the sequences come from.

    Returns:
        inputs [T, B, 2], a number and a marker; and targets [T, B], at each step the sum of the
        marked numbers so far, of which the last is the problem's answer.
    """
    numbers = torch.rand(steps, batch, generator=generator)
    order = torch.rand(steps // 2, batch, generator=generator).argsort(0)
    marks = torch.zeros(steps, batch).scatter_(0, order[:2], 1.0)
    return torch.stack((numbers, marks), dim=-1), (numbers * marks).cumsum(0)


class Adder(nn.Module):
    """A recurrent layer, and a linear readout of its state at each step."""

    def __init__(self, cell: str, hidden: int, steps: int) -> None:
        super().__init__()
        self.recurrent = _layer(cell, hidden, steps)
        self.readout = nn.Linear(hidden, 1)

    def forward(
        self, inputs: Tensor, truncation: fastbptt.truncation.Truncation | None = None
    ) -> Tensor:
        """[T, B, 2] to the answers [T, B]."""
        output, _ = self.recurrent(inputs, truncation=truncation)
        return self.readout(output).squeeze(-1)


def _layer(cell: str, hidden: int, steps: int) -> nn.Module:
    """A layer with which full backpropagation learns: where it does not, truncation is why.

    For a GRU, torch's own initialisation will do. The Elman network has to begin as one that
    keeps its state (Le, Jaitly and Hinton, "A simple way to initialize recurrent networks of
    rectified linear units", 2015), and the LSTM with forget gates as open as the lags are long
    (Tallec and Ollivier, "Can recurrent neural networks warp time?", 2018).
    """
    if cell == "gru":
        return fastbptt.GRU(2, hidden)
    if cell == "lstm":
        layer = fastbptt.LSTM(2, hidden)
        with torch.no_grad():
            forget = torch.linspace(1, steps - 1, hidden).log()
            layer.bias_hh_l0[:hidden] = -forget  # the input gate
            layer.bias_hh_l0[hidden : 2 * hidden] = forget
        return layer
    layer = fastbptt.RNN(2, hidden, nonlinearity="relu")
    nn.init.eye_(layer.weight_hh_l0)
    nn.init.zeros_(layer.bias_ih_l0)
    nn.init.zeros_(layer.bias_hh_l0)
    return layer


def loss_of(answers: Tensor, targets: Tensor, where: str) -> Tensor:
    """The mean squared error of answers [T, B]: of the last step, or over every step."""
    errors = (answers - targets).square()
    return errors[-1].mean() if where == "last" else errors.mean()


@torch.no_grad()
def held_out_error(model: Adder, inputs: Tensor, targets: Tensor) -> float:
    """The mean squared error at the last step, wherever the loss is in training."""
    return loss_of(model(inputs), targets, "last").item()
