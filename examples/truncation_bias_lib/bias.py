"""How far a truncated gradient is from the full one, and how much it varies."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shared_lib.progress import progress

from .modes import FULL, Modes
from .problem import Adder, draw, loss_of
from .training import Run, Settings


@dataclass(frozen=True)
class Bias:
    """The gradient of one truncation beside the full one's, in units of the full one's norm."""

    steps: int  # T, of the sequences
    loss: str
    mode: str
    weights: str  # "start" or "halfway": see `Run`
    bias: float  # norm of (mean gradient - mean full gradient)
    error: float  # what the finite number of draws makes of a bias of 0, root mean square
    deviation: float  # root of the mean squared distance of a gradient to its mean


def gradient(
    model: Adder, inputs: Tensor, targets: Tensor, loss: str, truncation: object
) -> Tensor:
    """The gradient of the recurrent layer's parameters, all in one float64 vector.

    That of the readout is left out: no truncation changes it.
    """
    value = loss_of(model(inputs, truncation), targets, loss)
    parts = torch.autograd.grad(value, list(model.recurrent.parameters()))
    return torch.cat([part.flatten() for part in parts]).double()


def compare(gradients: Tensor, full: Tensor) -> tuple[float, float, float]:
    """Bias, its error, and deviation of draws of a gradient, relative to the full gradient.

    The draws are paired: row i of both is for the same sequences. So the sequences' own scatter
    falls out of the bias, and for full backpropagation it is 0 exactly.

    Args:
        gradients: draws of the truncated gradient [n, P], n at least 2.
        full: the full gradient for the same sequences [n, P].
    """
    unit = full.mean(0).norm()
    n = len(full)
    difference = gradients - full
    bias = difference.mean(0)
    error = ((difference - bias).square().sum() / (n - 1) / n).sqrt()
    deviation = ((gradients - gradients.mean(0)).square().sum() / (n - 1)).sqrt()
    return float(bias.norm() / unit), float(error / unit), float(deviation / unit)


def measure(settings: Settings, modes: Modes, trained: Run, weights: str, draws: int) -> list[Bias]:
    """The bias of every mode at weights that a training run has kept, "start" or "halfway".

    Each draw takes new sequences, as a step of training does, and new gates where a mode draws
    them.
    """
    steps, loss = trained.steps, trained.loss
    model = Adder(settings.cell, settings.hidden, steps)
    model.load_state_dict(getattr(trained, weights))
    sequences = torch.Generator().manual_seed(settings.seed)
    truncations = {mode: make(settings.seed) for mode, make in modes.items()}
    gradients: dict[str, list[Tensor]] = {mode: [] for mode in modes}
    title = f"T = {steps}, loss {loss}: bias, {weights}"
    for _ in progress(range(draws), desc=title, unit="draw"):
        inputs, targets = draw(steps, settings.batch, sequences)
        for mode, truncation in truncations.items():
            gradients[mode].append(gradient(model, inputs, targets, loss, truncation))
    full = torch.stack(gradients[FULL])
    return [
        Bias(steps, loss, mode, weights, *compare(torch.stack(rows), full))
        for mode, rows in gradients.items()
    ]
