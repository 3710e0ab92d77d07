"""Cells made of a function, each the formula that its docstring names; for ``fastbptt.Recurrent``.

``pre`` and ``rec`` are W_ih x + b_ih and W_hh s + b_hh of each gate, s the state that W_hh sees.
"""

from fastbptt.cells.draws import Bernoulli, Normal
from fastbptt.cells.gated import (
    coupled_lstm,
    elman,
    gru,
    lstm,
    minimal_gated,
    peephole_lstm,
)
from fastbptt.cells.held import held_gru, held_lstm
from fastbptt.cells.leaky import (
    continuous_time,
    leaky,
    leaky_potential,
    leaky_rectified,
)
from fastbptt.cells.normalized import dreamer_gru, layer_norm_gru, layer_norm_lstm
from fastbptt.cells.regularized import (
    dropout_lstm,
    update_dropout_lstm,
    zoneout_gru,
    zoneout_lstm,
)
from fastbptt.cells.simple import decay_gru, independent

__all__ = [
    "Bernoulli",
    "Normal",
    "continuous_time",
    "coupled_lstm",
    "decay_gru",
    "dreamer_gru",
    "dropout_lstm",
    "elman",
    "gru",
    "held_gru",
    "held_lstm",
    "independent",
    "layer_norm_gru",
    "layer_norm_lstm",
    "leaky",
    "leaky_potential",
    "leaky_rectified",
    "lstm",
    "minimal_gated",
    "peephole_lstm",
    "update_dropout_lstm",
    "zoneout_gru",
    "zoneout_lstm",
]
