"""Cells whose state decays or recurs by a number for each unit."""

from __future__ import annotations

from torch import Tensor, exp, relu, sigmoid, tanh

from fastbptt.cell import cell

Values = tuple[Tensor, ...]


@cell(gates=1, states=1)
def independent(pre: Values, rec: Values, state: Values, weight: Tensor) -> Values:
    """Units that see themselves alone, by a weight each: h' = relu(pre + weight h); no W_hh.

    Li et al., "Independently recurrent neural network (IndRNN)", 2018.
    """
    (h,) = state
    return (relu(pre[0] + weight * h),)


@cell(gates=3, states=2, recurrent=1)
def decay_gru(
    pre: Values,
    rec: Values,
    state: Values,
    gap: Tensor | float,
    rate: Tensor | float,
    offset: Tensor | float = 0.0,
) -> Values:
    """A GRU whose state decays between steps; states (h, what is left of h at the next step).

        r, z, n as the GRU's,  h' = (1 - z) n + z left,  left' = h' exp(-relu(rate gap + offset))

    ``gap``, per step, is the time from a step to the next one (the last step's does not matter).
    Che et al., "Recurrent neural networks for multivariate time series with missing values", 2018
    (GRU-D), with a rate for each unit; what it does to the inputs is no recurrence.
    """
    left = state[1]
    r = sigmoid(pre[0] + rec[0])
    z = sigmoid(pre[1] + rec[1])
    h = (1 - z) * tanh(pre[2] + r * rec[2]) + z * left
    return h, h * exp(-relu(rate * gap + offset))
