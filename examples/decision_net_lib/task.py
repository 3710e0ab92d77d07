"""Which way do most dots move? A trial of a perceptual decision, as in neurogym."""

from dataclasses import dataclass

import torch
from torch import Tensor

DT = 20  # ms of a step
FIXATION, STIMULUS, DELAY, DECISION = (ms // DT for ms in (100, 800, 400, 200))  # steps
STEPS = FIXATION + STIMULUS + DELAY + DECISION
FIXATE, LEFT, RIGHT = range(3)  # what can be chosen at a step
COHERENCES = (-0.512, -0.256, -0.128, -0.064, -0.032, 0.0, 0.032, 0.064, 0.128, 0.256, 0.512)
SIGMA = 0.5  # of the stimulus's noise, at a step


@dataclass(frozen=True)
class Trials:
    """A batch of trials.

    Attributes:
        inputs: [T, B, 3], the cue to fixate and the evidence for left and for right.
        choices: [T, B], what is right at a step: to fixate until the cue is gone, then to choose.
        coherences: [B], how much more evidence there is for right than for left.
    """

    inputs: Tensor
    choices: Tensor
    coherences: Tensor


def draw(coherences: Tensor, generator: torch.Generator) -> Trials:
    """Trials of the given coherences, [B]; where one is 0, either side is right.

    The evidence for a side is 1/2 more or less half of the coherence while the stimulus is shown
    (Britten et al., "The analysis of visual motion: a comparison of neuronal and psychophysical
    performance", 1992), with noise at each step, and must be kept through a delay.
    """
    batch = len(coherences)
    inputs = torch.zeros(STEPS, batch, 3)
    inputs[: STEPS - DECISION, :, 0] = 1
    shown = slice(FIXATION, FIXATION + STIMULUS)
    sides = torch.tensor([-0.5, 0.5])
    noise = torch.randn(STIMULUS, batch, 2, generator=generator)
    inputs[shown, :, 1:] = 0.5 + coherences[:, None] * sides + SIGMA * noise
    coin = torch.rand(batch, generator=generator) < 0.5
    is_right = (coherences > 0) | ((coherences == 0) & coin)
    choices = torch.full((STEPS, batch), FIXATE)
    choices[STEPS - DECISION :] = torch.where(is_right, RIGHT, LEFT)
    return Trials(inputs, choices, coherences)


def draw_mixed(batch: int, generator: torch.Generator) -> Trials:
    """Trials whose coherences are drawn from those that there are."""
    which = torch.randint(len(COHERENCES), (batch,), generator=generator)
    return draw(torch.tensor(COHERENCES)[which], generator)
