"""Training, the psychometric curve, and the time of a training step."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from shared_lib.progress import progress

from .network import DecisionNet
from .task import COHERENCES, DECISION, RIGHT, Trials, draw, draw_mixed

FIXATION_WEIGHT = 0.2  # of the steps before the decision
RATE_COST = 1e-2  # of the mean square of the rates


def loss_of(logits: Tensor, rates: Tensor, trials: Trials) -> Tensor:
    """The cross entropy of what is chosen, while it is to be and before, and a cost of rates."""
    each = cross_entropy(logits.movedim(-1, 1), trials.choices, reduction="none")
    fixation, decision = each.split([len(each) - DECISION, DECISION])
    cost = RATE_COST * rates.square().mean()
    return FIXATION_WEIGHT * fixation.mean() + decision.mean() + cost


def right_choices(logits: Tensor) -> Tensor:
    """[B], whether right is the side with more votes while it is to be chosen."""
    return logits[-DECISION:].mean(0)[:, 1:].argmax(-1) + 1 == RIGHT


def train(model: DecisionNet, steps: int, batch: int, lr: float, seed: int) -> list[float]:
    """Trains; returns the loss of each step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    for _ in (bar := progress(range(steps), desc="training", lines=10)):
        trials = draw_mixed(batch, generator)
        optimizer.zero_grad()
        loss = loss_of(*model(trials.inputs), trials)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


@dataclass(frozen=True)
class Curve:
    """The psychometric curve.

    Attributes:
        right: for each of COHERENCES, the share of trials in which right is chosen.
        slope, bias: of 1 / (1 + exp(-slope (coherence - bias))), the most likely ones.
        rates: [coherences, T, H], the mean over trials.
    """

    right: list[float]
    slope: float
    bias: float
    rates: Tensor

    @property
    def threshold(self) -> float:
        """The coherence beyond the bias with 75% right choices."""
        return math.log(3) / self.slope if self.slope else math.inf


@torch.no_grad()
def psychometric(model: DecisionNet, trials: int, seed: int) -> Curve:
    """The choices of `trials` trials of each coherence, with noise in units and stimulus."""
    generator = torch.Generator().manual_seed(seed + 1)
    coherences = torch.tensor(COHERENCES).repeat_interleave(trials)
    logits, rates = model(draw(coherences, generator).inputs)
    right = right_choices(logits).double().unflatten(0, (-1, trials))
    slope, bias = _fit(torch.tensor(COHERENCES).double(), right.mean(1))
    return Curve(
        right.mean(1).tolist(), slope, bias, rates.unflatten(1, (-1, trials)).mean(2).movedim(0, 1)
    )


def _fit(x: Tensor, share: Tensor) -> tuple[float, float]:
    """Slope and bias of the logistic function closest to shares, by Newton's method.

    A little of both is added to the likelihood, so that a curve that is a step has a slope too.
    """
    a = torch.zeros(2, dtype=x.dtype)
    features = torch.stack((x, torch.ones_like(x)), -1)
    for _ in range(50):
        p = torch.sigmoid(features @ a)
        gradient = features.T @ (p - share) + 1e-4 * a
        hessian = features.T @ (features * (p * (1 - p))[:, None]) + 1e-4 * torch.eye(2)
        a = a - torch.linalg.solve(hessian, gradient).clamp(-5, 5)
    slope = float(a[0])
    return slope, -float(a[1]) / slope if slope else 0.0


@dataclass(frozen=True)
class Cost:
    """Seconds of a training step's forward and backward pass, medians, and how they differ."""

    ours: float
    loop: float
    ratio: float
    difference: float  # of the gradients, relative to the largest


def compare(model: DecisionNet, batch: int, rounds: int, seed: int) -> Cost:
    """Times both, in turn, on the same trials and noise."""
    trials = draw_mixed(batch, torch.Generator().manual_seed(seed + 2))
    noise = model.draw_noise(trials.inputs)

    def gradient(run: Callable) -> list[Tensor]:
        loss = loss_of(*run(trials.inputs, noise), trials)
        return torch.autograd.grad(loss, list(model.parameters()))

    found = [gradient(run) for run in (model, model.by_loop)]
    differences = [(a - b).abs().max() / b.abs().max() for a, b in zip(*found, strict=True)]
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for run, its in zip((model, model.by_loop), times, strict=True):
            begun = time.perf_counter()
            gradient(run)
            its.append(time.perf_counter() - begun)
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    ours, loop = map(statistics.median, times)
    return Cost(ours, loop, ratio, float(max(differences)))
