"""The same layers as a loop over the steps in torch, compiled by ``torch.compile``.

The compiler unrolls the loop, which takes it seconds a layer, and longer the longer the sequence
is: a peer for few steps. It compiles when results are checked, so off the clock.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LABEL = "torch.compile"
MAX_STEPS = 35
BACKEND = "inductor"

State = tuple[Tensor, ...]


def unavailable() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        torch.compile(lambda x: x + 1, backend=BACKEND)(torch.zeros(1))
    except Exception as error:  # no compiler, or one that fails: torch has no class for that
        return f"torch.compile does not work here ({type(error).__name__}: {error})".splitlines()[0]
    return None


# A step each in torch's formulas: x is the step's part of the input's product.


def _rnn(x: Tensor, state: State, w_hh: Tensor, b_hh: Tensor) -> State:
    return (torch.tanh(x + F.linear(state[0], w_hh, b_hh)),)


def _gru(x: Tensor, state: State, w_hh: Tensor, b_hh: Tensor) -> State:
    (h,) = state
    x_r, x_z, x_n = x.chunk(3, -1)
    h_r, h_z, h_n = F.linear(h, w_hh, b_hh).chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return (n + z * (h - n),)


def _lstm(x: Tensor, state: State, w_hh: Tensor, b_hh: Tensor) -> State:
    h, c = state
    i, f, g, o = (x + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


_STEPS: dict[str, tuple[Callable[..., State], int]] = {
    "rnn": (_rnn, 1),  # and how many states it has
    "gru": (_gru, 1),
    "lstm": (_lstm, 2),
}


def forward(cell: str, module: nn.Module) -> Callable[[Tensor], tuple[Tensor, State]]:
    """A compiled ``input -> (output, final state)`` with the module's own weights."""
    step, states = _STEPS[cell]

    def loop(input: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple:
        x = F.linear(input, w_ih, b_ih)
        state, outputs = (input.new_zeros(input.shape[1], w_hh.shape[1]),) * states, []
        for t in range(input.shape[0]):
            state = step(x[t], state, w_hh, b_hh)
            outputs.append(state[0])
        return torch.stack(outputs), tuple(s.unsqueeze(0) for s in state)

    torch.compiler.reset()  # everything is compiled anew, and there is a limit to that
    compiled = torch.compile(loop, backend=BACKEND, fullgraph=True, dynamic=False)
    return lambda input: compiled(input, *module.parameters())
