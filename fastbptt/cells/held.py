"""Gated cells whose state is held at some steps."""

from __future__ import annotations

from torch import Tensor, sigmoid, tanh, where

from fastbptt.cell import cell

Values = tuple[Tensor, ...]


@cell(gates=3, states=1)
def held_gru(pre: Values, rec: Values, state: Values, mask: Tensor | float) -> Values:
    """A GRU that steps where ``mask`` is not 0, and else keeps its state whatever the input is."""
    (h,) = state
    r = sigmoid(pre[0] + rec[0])
    z = sigmoid(pre[1] + rec[1])
    n = tanh(pre[2] + r * rec[2])
    return (where(mask != 0, (1 - z) * n + z * h, h),)


@cell(gates=4, states=2)
def held_lstm(pre: Values, rec: Values, state: Values, mask: Tensor | float) -> Values:
    """An LSTM that steps where ``mask`` is not 0, and else keeps h and c."""
    h, c = state
    i, f, g, o = (p + r for p, r in zip(pre, rec, strict=True))
    new = sigmoid(f) * c + sigmoid(i) * tanh(g)
    steps = mask != 0
    return where(steps, sigmoid(o) * tanh(new), h), where(steps, new, c)
