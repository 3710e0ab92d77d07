"""Gated cells with noise in the recurrence: zoneout, and dropout of the state and of its update."""

from __future__ import annotations

from torch import Tensor, sigmoid, tanh

from fastbptt.cell import cell

Values = tuple[Tensor, ...]


def _lstm(pre: Values, rec: Values, c: Tensor, update: Tensor | float = 1.0) -> Values:
    i, f, g, o = (p + r for p, r in zip(pre, rec, strict=True))
    c = sigmoid(f) * c + sigmoid(i) * tanh(g) * update
    return sigmoid(o) * tanh(c), c


@cell(gates=4, states=2)
def zoneout_lstm(
    pre: Values, rec: Values, state: Values, zone_h: Tensor | float, zone_c: Tensor | float
) -> Values:
    """An LSTM whose h and c stay where ``zone_h`` and ``zone_c`` are 1.

    They are :class:`Bernoulli` of the probability to stay, or masks per step. In evaluation the
    probability takes the mask's place, and the state is the expectation. Krueger et al., "Zoneout:
    regularizing RNNs by randomly preserving hidden activations", 2017; the new h is of the new c
    as it is before zoneout.
    """
    h, c = state
    new_h, new_c = _lstm(pre, rec, c)
    return new_h + zone_h * (h - new_h), new_c + zone_c * (c - new_c)


@cell(gates=3, states=1)
def zoneout_gru(pre: Values, rec: Values, state: Values, zone_h: Tensor | float) -> Values:
    """A GRU whose h stays where ``zone_h`` is 1; see :func:`zoneout_lstm`."""
    (h,) = state
    r = sigmoid(pre[0] + rec[0])
    z = sigmoid(pre[1] + rec[1])
    new = (1 - z) * tanh(pre[2] + r * rec[2]) + z * h
    return (new + zone_h * (h - new),)


@cell(gates=4, states=3, recurrent=2)
def dropout_lstm(pre: Values, rec: Values, state: Values, mask: Tensor | float) -> Values:
    """An LSTM whose W_hh sees ``mask`` h; states (h, c, mask h).

    ``mask`` is 0 or 1 / (1 - p): a Bernoulli(1 - p, 1 / (1 - p), per_sequence=True), or per step.
    Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
    networks", 2016.
    """
    h, c = _lstm(pre, rec, state[1])
    return h, c, h * mask


@cell(gates=4, states=2)
def update_dropout_lstm(pre: Values, rec: Values, state: Values, mask: Tensor | float) -> Values:
    """An LSTM that drops the update alone: c' = f c + i g ``mask``.

    Semeniuta, Severyn and Barth, "Recurrent dropout without memory loss", 2016.
    """
    return _lstm(pre, rec, state[1], mask)
