"""The backends and their recurrent layers, and the state of one."""

from collections.abc import Callable

from torch import Tensor, nn

import fastbptt

BACKENDS = ("torch", "fastbptt")

State = Tensor | tuple[Tensor, ...] | None  # [layers, B, H], or several of them; None is zeros

# The recurrent layers to choose from: name -> (torch's, ours).
CELLS = {
    "rnn": (nn.RNN, fastbptt.RNN),
    "gru": (nn.GRU, fastbptt.GRU),
    "lstm": (nn.LSTM, fastbptt.LSTM),
}


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Apply `function` to the state, or to each part of a state that has several."""
    if isinstance(state, tuple):
        return tuple(function(part) for part in state)
    return None if state is None else function(state)
