"""Gated cells with layer normalization inside the recurrence.

Gains and shifts are numbers unless they are given as parameters: [G, H] where they have a value for
each gate, [H] where they are c's. The network's own biases, inside the normalizations, are 0 in the
first two cells' sources: ``bias=False``.
"""

from __future__ import annotations

from torch import Tensor, sigmoid, tanh

from fastbptt.cell import cell
from fastbptt.normalization import layer_norm

Values = tuple[Tensor, ...]


@cell(gates=3, states=1, per_gate=("gain_x", "gain_h", "shift_x", "shift_h"))
def layer_norm_gru(
    pre: Values,
    rec: Values,
    state: Values,
    gain_x: Values = 1.0,
    gain_h: Values = 1.0,
    shift_x: Values = 0.0,
    shift_h: Values = 0.0,
) -> Values:
    """A GRU whose W_ih x and W_hh h are each normalized, over the units of all gates.

    x = LN(pre) gain_x + shift_x and y = LN(rec) gain_h + shift_h take the places of pre and rec in
    gates r, z, n: h' = (1 - z) n + z h, n = tanh(x_n + r y_n). As LayerNormGRU of Haste, whose
    gates are z, r, n. Ba, Kiros and Hinton, "Layer normalization", 2016.
    """
    (h,) = state
    x, y = layer_norm(pre, gain_x, shift_x), layer_norm(rec, gain_h, shift_h)
    r = sigmoid(x[0] + y[0])
    z = sigmoid(x[1] + y[1])
    n = tanh(x[2] + r * y[2])
    return ((1 - z) * n + z * h,)


@cell(gates=4, states=2, per_gate=("gain_x", "gain_h", "shift"))
def layer_norm_lstm(
    pre: Values,
    rec: Values,
    state: Values,
    gain_x: Values = 1.0,
    gain_h: Values = 1.0,
    shift: Values = 0.0,
    gain_c: Tensor | float = 1.0,
    shift_c: Tensor | float = 0.0,
) -> Values:
    """An LSTM whose W_ih x, W_hh h and c are each normalized.

    Gates i, f, g, o of LN(pre) gain_x + LN(rec) gain_h + shift: c' = f c + i g and
    h' = o tanh(LN(c') gain_c + shift_c). Ba, Kiros and Hinton, "Layer normalization", 2016, and
    LayerNormLSTM of Haste, whose gates are i, g, f, o. LayerNormLSTMCell of PyTorch's benchmarks
    differs in that the normalized c' is also the next step's state.
    """
    x, y = layer_norm(pre, gain_x), layer_norm(rec, gain_h, shift)
    i, f, g, o = (a + b for a, b in zip(x, y, strict=True))
    c = sigmoid(f) * state[1] + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(layer_norm(c, gain_c, shift_c)), c


@cell(gates=3, states=1, per_gate=("gain", "shift"))
def dreamer_gru(
    pre: Values, rec: Values, state: Values, gain: Values = 1.0, shift: Values = 0.0
) -> Values:
    """A GRU whose gates are normalized together, W_ih x + W_hh h over the units of all of them.

    Gates r, n, z of LN(pre + rec) gain + shift: h' = (1 - z) h + z tanh(r n), r a sigmoid and
    z = sigmoid(z - 1), so that it begins with long memory. Hafner et al., "Mastering Atari with
    discrete world models", 2021 (DreamerV2); eps is 1e-3 as there.
    """
    (h,) = state
    sums = tuple(p + q for p, q in zip(pre, rec, strict=True))
    r, n, z = layer_norm(sums, gain, shift, eps=1e-3)
    z = sigmoid(z - 1)
    return ((1 - z) * h + z * tanh(sigmoid(r) * n),)
