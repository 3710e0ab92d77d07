"""The chain of Tallec and Ollivier's influence balancing, and how its parameter is learnt.

"Unbiased Online Recurrent Optimization" and "Unbiasing Truncated Backpropagation Through Time",
2017: s_t = A s_{t-1} + theta (1, ..., 1, -1, ..., -1), where each unit halves itself and takes half
of the next one. The loss is (s_t[0] - 1)^2 / 2. What theta does reaches the first unit with a delay
that grows with the distance, so the ten units with theta speak first, the thirteen with -theta
later and louder.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import fastbptt
from fastbptt.truncation import Truncation

UNITS, POSITIVE = 23, 10
START = 0.5  # theta before training; the best is -1/6
DIVERGED = 1e6  # the loss at which a run is given up

WINDOWS = (1, 10, 20, 30, 50, 100)  # K
WINDOW_RATE = 1e-4
SEGMENT = 200  # steps between two updates where the truncation is within a call
RATES = (1e-4, 1e-5)


class Chain(nn.Module):
    """The chain as a recurrent layer without a nonlinearity; its one parameter is theta."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(START, dtype=torch.float64))
        self.layer = fastbptt.RNN(
            UNITS, UNITS, nonlinearity="identity", bias=False, dtype=torch.float64
        ).requires_grad_(False)
        eye = torch.eye(UNITS, dtype=torch.float64)
        signs = torch.where(torch.arange(UNITS) < POSITIVE, 1.0, -1.0).double()
        self.register_buffer("signs", signs)
        with torch.no_grad():
            self.layer.weight_ih_l0.copy_(eye)
            self.layer.weight_hh_l0.copy_(0.5 * eye + 0.5 * eye.roll(1, 1).triu())

    def at_rest(self) -> Tensor:
        """The state [1, 1, UNITS] that stays as it is, for the theta of now."""
        eye = torch.eye(UNITS, dtype=torch.float64)
        state = torch.linalg.solve(eye - self.layer.weight_hh_l0, self.signs * self.theta.detach())
        return state.view(1, 1, UNITS)

    def forward(
        self, state: Tensor, steps: int, truncation: Truncation | None = None
    ) -> tuple[Tensor, Tensor]:
        """The losses [steps] of the next steps, and the state after them."""
        inputs = (self.theta * self.signs).expand(steps, 1, UNITS)
        output, state = self.layer(inputs, state, truncation=truncation)
        return 0.5 * (output[:, 0, 0] - 1).square(), state


def influence(steps: int) -> float:
    """d s_t[0] / d theta through the last `steps` steps: what a truncation there believes."""
    chain = Chain()
    inputs = (chain.theta * chain.signs).expand(2 * steps, 1, UNITS)
    output, _ = chain.layer(inputs, truncation=fastbptt.Sliding(steps))
    (slope,) = torch.autograd.grad(output[-1, 0, 0], chain.theta)
    return float(slope)


@dataclass
class Run:
    """What learning has come to."""

    losses: list[float] = field(default_factory=list)  # of the last step before each update
    theta: float = START
    diverged: bool = False

    @property
    def outcome(self) -> str:
        """The last loss, or that there is none."""
        if self.diverged:
            return f"diverges (update {len(self.losses)})"
        return f"{self.losses[-1]:.3g}" if self.losses[-1] >= 1 else f"{self.losses[-1]:.1e}"


def learn(
    steps: int, truncation: Truncation | None, rate: float, updates: int, *, every: bool
) -> Run:
    """Gradient descent online: the state goes on from one update to the next, detached.

    Args:
        steps: from one update to the next.
        truncation: within these steps.
        rate: of learning.
        updates: after which a run ends.
        every: the loss is the sum over the steps, else that of the last one.
    """
    chain = Chain()
    state, run = chain.at_rest(), Run()
    for _ in range(updates):
        losses, state = chain(state.detach(), steps, truncation)
        (slope,) = torch.autograd.grad(losses.sum() if every else losses[-1], chain.theta)
        with torch.no_grad():
            chain.theta -= rate * slope
        run.losses.append(losses[-1].item())
        if not run.losses[-1] < DIVERGED or not math.isfinite(chain.theta.item()):
            run.diverged = True
            break
    run.theta = chain.theta.item()
    return run


def learn_by_windows(window: int, updates: int) -> Run:
    """An update after each `window` steps, by the loss of the last of them."""
    return learn(window, None, WINDOW_RATE, updates, every=False)


def truncations(seed: int) -> dict[str, Truncation | None]:
    """What is compared within a segment, by name; `seed` is for the last."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "None": None,
        "Chunked(16)": fastbptt.Chunked(16),
        "Sliding(16)": fastbptt.Sliding(16),
        "Sliding(100)": fastbptt.Sliding(100),
        "Randomized(mean_length=16)": fastbptt.Randomized(mean_length=16, generator=generator),
    }


RANDOM = "Randomized(mean_length=16)"


def learn_by_segments(name: str, rate: float, updates: int, seed: int) -> Run:
    """An update after each `SEGMENT` steps, by the loss of all of them."""
    return learn(SEGMENT, truncations(seed)[name], rate, updates, every=True)
