"""The built-in cells as functions, and gated cells close to them."""

from __future__ import annotations

from torch import Tensor, sigmoid, tanh

from fastbptt.cell import cell

Values = tuple[Tensor, ...]


@cell(gates=1, states=1)
def elman(pre: Values, rec: Values, state: Values) -> Values:
    """As :class:`fastbptt.RNN`: h' = tanh(pre + rec)."""
    return (tanh(pre[0] + rec[0]),)


@cell(gates=3, states=1)
def gru(pre: Values, rec: Values, state: Values) -> Values:
    """Gates r, z, n as :class:`fastbptt.GRU`: h' = (1 - z) n + z h."""
    (h,) = state
    r = sigmoid(pre[0] + rec[0])
    z = sigmoid(pre[1] + rec[1])
    n = tanh(pre[2] + r * rec[2])
    return ((1 - z) * n + z * h,)


@cell(gates=4, states=2)
def lstm(pre: Values, rec: Values, state: Values) -> Values:
    """Gates i, f, g, o as :class:`fastbptt.LSTM`: c' = f c + i g, h' = o tanh(c')."""
    i, f, g, o = (p + r for p, r in zip(pre, rec, strict=True))
    c = sigmoid(f) * state[1] + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(c), c


@cell(gates=4, states=2)
def peephole_lstm(
    pre: Values, rec: Values, state: Values, peep_i: Tensor, peep_f: Tensor, peep_o: Tensor
) -> Values:
    """An LSTM whose gates see the cell: i and f the old c, o the new one, by a weight per unit.

    Gers, Schraudolph and Schmidhuber, "Learning precise timing with LSTM recurrent networks", 2002.
    """
    i, f, g, o = (p + r for p, r in zip(pre, rec, strict=True))
    c = state[1]
    i, f = sigmoid(i + peep_i * c), sigmoid(f + peep_f * c)
    c = f * c + i * tanh(g)
    return sigmoid(o + peep_o * c) * tanh(c), c


@cell(gates=3, states=2)
def coupled_lstm(pre: Values, rec: Values, state: Values) -> Values:
    """An LSTM without an input gate, gates f, g, o: c' = f c + (1 - f) g.

    Greff et al., "LSTM: a search space odyssey", 2015 (CIFG).
    """
    f, g, o = (p + r for p, r in zip(pre, rec, strict=True))
    f = sigmoid(f)
    c = f * state[1] + (1 - f) * tanh(g)
    return sigmoid(o) * tanh(c), c


@cell(gates=2, states=1)
def minimal_gated(pre: Values, rec: Values, state: Values) -> Values:
    """One gate f, and n: h' = (1 - f) h + f n, with n = tanh(pre + f rec).

    Zhou et al., "Minimal gated unit for recurrent neural networks", 2016; with the gate applied
    after the matrix product, as torch's GRU does.
    """
    (h,) = state
    f = sigmoid(pre[0] + rec[0])
    n = tanh(pre[1] + f * rec[1])
    return ((1 - f) * h + f * n,)
