"""Leaky units: rates or potentials that move a part of the way to their input in a step."""

from __future__ import annotations

from torch import Tensor, relu, tanh

from fastbptt.cell import cell

Values = tuple[Tensor, ...]


@cell(gates=1, states=1)
def leaky(
    pre: Values, rec: Values, state: Values, alpha: Tensor | float, noise: Tensor | float = 0.0
) -> Values:
    """Rates, the leak outside the nonlinearity: h' = (1 - alpha) h + alpha tanh(pre + rec + noise).

    Jaeger et al., "Optimization and applications of echo state networks with leaky-integrator
    neurons", 2007.
    """
    (h,) = state
    return (h + alpha * (tanh(pre[0] + rec[0] + noise) - h),)


@cell(gates=1, states=1)
def leaky_rectified(
    pre: Values, rec: Values, state: Values, alpha: Tensor | float, noise: Tensor | float = 0.0
) -> Values:
    """As :func:`leaky` with a rectifier: h' = (1 - alpha) h + alpha relu(pre + rec + noise).

    Song, Yang and Wang, "Training excitatory-inhibitory recurrent neural networks for cognitive
    tasks", 2016.
    """
    (h,) = state
    return (h + alpha * (relu(pre[0] + rec[0] + noise) - h),)


@cell(gates=1, states=2)
def leaky_potential(
    pre: Values, rec: Values, state: Values, alpha: Tensor | float, noise: Tensor | float = 0.0
) -> Values:
    """Potentials u, the leak inside the nonlinearity; states (r, u), and W_hh sees the rates r.

        u' = (1 - alpha) u + alpha (pre + rec + noise),  r' = tanh(u')

    Sussillo and Abbott, "Generating coherent patterns of activity from chaotic neural networks",
    2009.
    """
    u = state[1]
    u = u + alpha * (pre[0] + rec[0] + noise - u)
    return tanh(u), u


@cell(gates=1, states=1)
def continuous_time(
    pre: Values,
    rec: Values,
    state: Values,
    dt: Tensor | float,
    tau: Tensor | float,
    noise: Tensor | float = 0.0,
) -> Values:
    """A step of Euler's method, of the length dt, of tau dh/dt = -h + tanh(pre + rec + noise).

    Funahashi and Nakamura, "Approximation of dynamical systems by continuous time recurrent neural
    networks", 1993.
    """
    (h,) = state
    return (h + dt / tau * (tanh(pre[0] + rec[0] + noise) - h),)
