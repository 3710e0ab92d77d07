"""Leaky units that obey Dale's law, and the same network by a loop over steps."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils import parametrize

import fastbptt
from fastbptt import cells

from .task import DT

TAU = 100  # ms
ALPHA = DT / TAU


class Dale(nn.Module):
    """W_hh as |W| with the sign of the unit that each column comes from, none onto itself."""

    def __init__(self, signs: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", signs * (1 - torch.eye(len(signs))))

    def forward(self, weight: Tensor) -> Tensor:
        """[H, H] to [H, H]."""
        return weight.abs() * self.factor


class DecisionNet(nn.Module):
    """Rates h' = (1 - alpha) h + alpha relu(W_ih x + W_hh h + b + noise), and a readout.

    Song, Yang and Wang, "Training excitatory-inhibitory recurrent neural networks for cognitive
    tasks", 2016. Four units of five are excitatory, and they alone are read out.

    Args:
        units: H.
        noise: of a unit's input, as the standard deviation of its rate would be alone.
    """

    def __init__(self, units: int, noise: float) -> None:
        super().__init__()
        self.excitatory = units * 4 // 5
        self.noise = noise * math.sqrt(2 / ALPHA)
        self.recurrent = fastbptt.Recurrent(
            cells.leaky_rectified, 3, units, alpha=ALPHA, noise=cells.Normal(self.noise)
        )
        self.readout = nn.Linear(self.excitatory, 3)
        signs = torch.ones(units)
        signs[self.excitatory :] = -1
        with torch.no_grad():
            self.recurrent.weight_hh_l0.copy_(self._balanced(units))
            nn.init.uniform_(self.recurrent.weight_ih_l0, -0.5, 0.5)
        parametrize.register_parametrization(self.recurrent, "weight_hh_l0", Dale(signs))

    def _balanced(self, units: int) -> Tensor:
        """Weights without a sign, excitation and inhibition of equal sums, spectral radius 1."""
        weight = torch.rand(units, units).square()
        inhibitory = units - self.excitatory
        weight[:, self.excitatory :] *= self.excitatory / inhibitory
        signed = weight.clone()
        signed[:, self.excitatory :] *= -1
        return weight / torch.linalg.eigvals(signed).abs().max()

    def forward(self, inputs: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Inputs [T, B, 3] to logits [T, B, 3] and rates [T, B, H]; noise [T, B, H] or drawn."""
        rates, _ = self.recurrent(inputs, **({} if noise is None else {"noise": noise}))
        return self.readout(rates[..., : self.excitatory]), rates

    def draw_noise(self, inputs: Tensor) -> Tensor:
        """[T, B, H]."""
        return self.noise * torch.randn(*inputs.shape[:2], self.recurrent.hidden_size)

    def by_loop(self, inputs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """As ``forward``, a step after the other by torch's own operations."""
        net = self.recurrent
        weight_hh, rate, rates = net.weight_hh_l0, inputs.new_zeros(net.hidden_size), []
        for x, n in zip(inputs, noise, strict=True):
            total = linear(x, net.weight_ih_l0, net.bias_ih_l0)
            total = total + linear(rate, weight_hh, net.bias_hh_l0) + n
            rate = (1 - ALPHA) * rate + ALPHA * torch.relu(total)
            rates.append(rate)
        stacked = torch.stack(rates)
        return self.readout(stacked[..., : self.excitatory]), stacked

    def step(self, rate: Tensor, x: Tensor) -> Tensor:
        """One step without noise: a rate [H] and an input [3] to the next rate [H]."""
        net = self.recurrent
        weights = (net.weight_ih_l0, net.weight_hh_l0, net.bias_ih_l0, net.bias_hh_l0)
        return net.cell.step(("alpha",), x, (rate,), *weights, torch.tensor(ALPHA))[0]
