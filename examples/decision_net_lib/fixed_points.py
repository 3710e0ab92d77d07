"""Where the network's dynamics stand still, and what they do close by.

Sussillo and Barak, "Opening the black box: low-dimensional dynamics in high-dimensional recurrent
neural networks", 2013.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from .network import DecisionNet
from .task import DT

RELAXATION = 200  # steps after which the rates are starts as well
LENGTHS = 0.5 ** torch.arange(6).double()  # of Newton's step, the best of which is taken
TOLERANCE = 1e-9  # of the largest change of a rate in a step
APART = 1e-2  # of the norm of the largest: closer ones are the same


@dataclass(frozen=True)
class FixedPoint:
    """A rate that a step leaves as it is.

    Attributes:
        rate: [H].
        eigenvalues: [H], complex, of the step's Jacobian, the largest first.
    """

    rate: Tensor
    eigenvalues: Tensor

    @property
    def is_stable(self) -> bool:
        """Whether what is close to it comes closer."""
        return bool(self.eigenvalues[0].abs() < 1)

    @property
    def time_constant(self) -> float:
        """Of the slowest direction, in ms: of decay, or of growth if it is not stable."""
        return DT / abs(float(self.eigenvalues[0].abs().log()))


def find(model: DecisionNet, x: Tensor, starts: Tensor, iterations: int = 20) -> list[FixedPoint]:
    """Fixed points for a constant input, by Newton's method from many rates and what they become.

    A rectifier's dynamics are linear in pieces, so that it ends where it comes to the right piece;
    its steps are shortened where they would go too far.

    Args:
        model: whose step it is.
        x: the input, [3].
        starts: rates to begin with, [N, H].
        iterations: of Newton's method, at most.

    Returns:
        Those that were found, in the order of their stability.
    """
    exact = copy.deepcopy(model).double()
    x, rates = x.double(), starts.double()

    def change(rate: Tensor) -> Tensor:
        return exact.step(rate, x) - rate

    with torch.no_grad():
        step = torch.vmap(lambda rate: exact.step(rate, x))
        later = rates
        for _ in range(RELAXATION):
            later = step(later)
        rates = torch.cat((rates, later))
        jacobian = torch.vmap(torch.func.jacfwd(change))
        for _ in range(iterations):
            missing = step(rates) - rates
            towards = torch.linalg.lstsq(jacobian(rates), -missing.unsqueeze(-1)).solution
            tried = rates + LENGTHS[:, None, None] * towards.squeeze(-1)
            error = (step(tried.flatten(0, 1)).view_as(tried) - tried).norm(dim=-1)
            rates = tried[error.argmin(0), torch.arange(len(rates))]
        rates = rates[(step(rates) - rates).abs().amax(-1) < TOLERANCE]
        largest = rates.norm(dim=-1).amax() if len(rates) else 0.0
        found: list[FixedPoint] = []
        for rate in rates:
            if all((rate - other.rate).norm() > APART * largest for other in found):
                eigenvalues = torch.linalg.eigvals(torch.func.jacfwd(exact.step)(rate, x))
                order = eigenvalues.abs().argsort(descending=True)
                found.append(FixedPoint(rate, eigenvalues[order]))
    return sorted(found, key=lambda point: float(point.eigenvalues[0].abs()))
