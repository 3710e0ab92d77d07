"""Modules with options, their steps by hand and data; for return_states, reset_to and clip_grad."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import brute
import by_hand
import fastbptt
import shipped
from common import parts
from fastbptt import TBPTT, Chunked, Gated, Randomized, Sliding, cells

T, B, I, H = 6, 3, 2, 4
MODULES = {
    "tanh": shipped.elman,
    "relu": lambda layer, x, s, _: (torch.rnn_relu_cell(x, s[0], *shipped.weights(layer)),),
    "identity": lambda layer, x, s, _: (layer.pre(x)[0] + layer.rec(s[0])[0],),
    "gru": shipped.gru,
    "lstm": shipped.lstm,
}
RECURRENT = ("leaky", "dropout_lstm", "layer_norm_lstm")  # of one state, three, and two phases
CELLS = {"tanh": cells.elman, "relu": cells.elman, "identity": cells.elman}
CELLS |= {"gru": cells.gru, "lstm": cells.lstm}
MODES = {
    "full": None,
    "chunked": Chunked(2),
    "windows": TBPTT(2, 4),
    "last": TBPTT(2, 3, "last"),
    "sliding": Sliding(3),
    "gated": Gated(torch.tensor([0.5, 1.0, 0.25, 2.0, 0.0, 0.75])),
    "randomized": Randomized(pi=0.6, per_sequence=True),
}
OVERLAPPING = ("windows", "last", "sliding")
FORMS = ("layers", "learned", "steps")  # of reset_to
CLIP = 0.04  # of gradients most of which are larger


def extras_of(name):
    """The arguments that a cell of ``RECURRENT`` has, some of them parameters."""
    if name == "leaky":
        return {"alpha": 0.3}
    if name == "dropout_lstm":
        return {"mask": 0.8}
    gains = {"gain_h": (4, H), "shift": (4, H), "gain_c": (H,), "shift_c": (H,)}
    return {"gain_x": 1.5} | {
        name: torch.nn.Parameter(torch.rand(shape, dtype=torch.float64) + 0.5)
        for name, shape in gains.items()
    }


class Net:
    """A module, its step by hand, and leaves."""

    def __init__(self, name, layers=1, bidirectional=False, form="layers", **options):
        torch.default_generator.manual_seed(1)
        options |= {"bidirectional": bidirectional, "dtype": torch.float64}
        if name in RECURRENT:
            self.step = shipped.SHIPPED[name].step
            cell = getattr(cells, name)
            extras = extras_of(name)
            self.module = self.view = fastbptt.Recurrent(cell, I, H, layers, **options, **extras)
        else:
            self.step, cell = MODULES[name], CELLS[name]
            cls = {"gru": fastbptt.GRU, "lstm": fastbptt.LSTM}.get(name, fastbptt.RNN)
            if cls is fastbptt.RNN:
                options["nonlinearity"] = name
            self.module = cls(I, H, layers, **options)
            self.view = SimpleNamespace(
                num_layers=layers, bidirectional=bidirectional, cell=cell, extras={}
            )
            for parameter, value in self.module.named_parameters():
                setattr(self.view, parameter, value)
        count = layers * (2 if bidirectional else 1)
        shape = {"layers": (B,), "learned": (1,), "steps": (T, B)}[form]

        def draw(*sizes):
            return (torch.rand(*sizes, dtype=torch.float64) * 2 - 1).requires_grad_()

        self.x = draw(T, B, I)
        self.hx = [draw(count, B, H) for _ in range(cell.states)]
        self.reset_to = [draw(count, *shape, H) for _ in range(cell.states)]
        self.resets = torch.rand(T, B) < 0.4
        self.resets[0, 1] = self.resets[3] = True
        self.form = form

    @property
    def leaves(self):
        leaves = {"x": self.x, **dict(self.module.named_parameters())}
        for name in ("hx", "reset_to"):
            leaves |= {f"{name}{i}": state for i, state in enumerate(getattr(self, name))}
        return leaves

    def wide(self):
        """reset_to as [L*D, T, B, H]."""
        if self.form == "steps":
            return self.reset_to
        return [each.unsqueeze(1).expand(-1, T, B, -1) for each in self.reset_to]

    def call(self, input=None, hx=None, **options):
        input = self.x if input is None else input
        states = whole_of(self.hx) if hx is None else hx
        output, last, *every = self.module(input, states, **options)
        return output, parts(last), parts(every[0]) if every else ()

    def by_hand(self, truncation, resets, reset_to, clip):
        with_given = self.wide() if reset_to else ()
        rest = (truncation, self.resets if resets else None, {}, with_given, clip)
        return brute.run(self.view, self.step, self.x, self.hx, *rest)

    def gradients(self, output, last, every, **options):
        """Outputs and gradients by name; a loss in the states, too."""
        return by_hand.gradients(self.leaves, output, last, every, **options)


def whole_of(states):
    return tuple(states) if len(states) > 1 else states[0]
