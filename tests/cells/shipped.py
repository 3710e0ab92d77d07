"""Each cell of fastbptt.cells beside a step of it by hand, from torch's own cells where it can."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, sigmoid, tanh
from torch.nn.functional import layer_norm

from brute import Step
from fastbptt import cells
from fastbptt.cell import Cell


@dataclass(frozen=True)
class Shipped:
    """A cell, its step by hand and its arguments.

    "unit" is a parameter [H], "gate" one [G, H], another name an input per step.
    """

    cell: Cell
    step: Step
    extras: dict[str, Any] = field(default_factory=dict)
    masks: tuple[str, ...] = ()  # inputs per step that are 0 or 1


def weights(layer):
    return layer.w, layer.u, layer.b, layer.c


def elman(layer, x, states, extras):
    return (torch.rnn_tanh_cell(x, states[0], *weights(layer)),)


def gru(layer, x, states, extras):
    return (torch.gru_cell(x, states[0], *weights(layer)),)


def lstm(layer, x, states, extras):
    return torch.lstm_cell(x, states, *weights(layer))


def peephole_lstm(layer, x, states, extras):
    h, c = states
    i, f, g, o = (a + b for a, b in zip(layer.pre(x), layer.rec(h), strict=True))
    i = sigmoid(i + c * extras["peep_i"])
    f = sigmoid(f + c * extras["peep_f"])
    new = f * c + i * tanh(g)
    return sigmoid(o + new * extras["peep_o"]) * tanh(new), new


def coupled_lstm(layer, x, states, extras):
    h, c = states
    f, g, o = (a + b for a, b in zip(layer.pre(x), layer.rec(h), strict=True))
    new = torch.lerp(tanh(g), c, sigmoid(f))
    return sigmoid(o) * tanh(new), new


def minimal_gated(layer, x, states, extras):
    (h,) = states
    (a, b), (p, q) = layer.pre(x), layer.rec(h)
    f = sigmoid(a + p)
    return (torch.lerp(h, tanh(b + f * q), f),)


def rate(phi):
    def step(layer, x, states, extras):
        (h,) = states
        drive = layer.pre(x)[0] + layer.rec(h)[0] + extras["noise"]
        return ((1 - extras["alpha"]) * h + extras["alpha"] * phi(drive),)

    return step


def leaky_potential(layer, x, states, extras):
    r, u = states
    drive = layer.pre(x)[0] + layer.rec(r)[0] + extras["noise"]
    new = (1 - extras["alpha"]) * u + extras["alpha"] * drive
    return tanh(new), new


def continuous_time(layer, x, states, extras):
    (h,) = states
    drive = tanh(layer.pre(x)[0] + layer.rec(h)[0] + extras["noise"])
    return (h + (drive - h) * extras["dt"] / extras["tau"],)


def zoneout_lstm(layer, x, states, extras):
    old, new = states, torch.lstm_cell(x, states, *weights(layer))
    zones = extras["zone_h"], extras["zone_c"]
    return tuple(z * a + (1 - z) * b for z, a, b in zip(zones, old, new, strict=True))


def zoneout_gru(layer, x, states, extras):
    new, z = torch.gru_cell(x, states[0], *weights(layer)), extras["zone_h"]
    return (z * states[0] + (1 - z) * new,)


def dropout_lstm(layer, x, states, extras):
    _, c, seen = states
    h, c = torch.lstm_cell(x, (seen, c), *weights(layer))
    return h, c, extras["mask"] * h


def update_dropout_lstm(layer, x, states, extras):
    h, c = states
    i, f, g, o = (a + b for a, b in zip(layer.pre(x), layer.rec(h), strict=True))
    new = sigmoid(f) * c + extras["mask"] * (sigmoid(i) * tanh(g))
    return sigmoid(o) * tanh(new), new


def held(step):
    def held_step(layer, x, states, extras):
        new, m = step(layer, x, states, extras), extras["mask"].detach()  # a choice
        return tuple(m * b + (1 - m) * a for a, b in zip(states, new, strict=True))

    return held_step


def independent(layer, x, states, extras):
    return ((layer.pre(x)[0] + states[0] * extras["weight"]).clamp(min=0),)


def decay_gru(layer, x, states, extras):
    h = torch.gru_cell(x, states[1], *weights(layer))
    decay = torch.exp(-torch.clamp(extras["gap"] * extras["rate"] + extras["offset"], min=0))
    return h, h * decay


def normed(parts, gain=1.0, shift=0.0, eps=1e-5):
    """torch's layer normalization of the parts side by side, in as many parts."""
    joint = torch.cat(parts, -1)
    of_all = (
        torch.as_tensor(x, dtype=joint.dtype).expand(len(parts), parts[0].size(-1)).flatten()
        for x in (gain, shift)
    )
    return layer_norm(joint, joint.shape[-1:], *of_all, eps).chunk(len(parts), -1)


def layer_norm_gru(layer, x, states, extras):
    r, z, n = normed(layer.pre(x), extras["gain_x"], extras["shift_x"])
    p, q, s = normed(layer.rec(states[0]), extras["gain_h"], extras["shift_h"])
    return (torch.lerp(tanh(n + sigmoid(r + p) * s), states[0], sigmoid(z + q)),)


def layer_norm_lstm(layer, x, states, extras):
    h, c = states
    a = normed(layer.pre(x), extras["gain_x"])
    b = normed(layer.rec(h), extras["gain_h"], extras["shift"])
    i, f, g, o = (p + q for p, q in zip(a, b, strict=True))
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    (seen,) = normed([c], extras["gain_c"], extras["shift_c"])
    return sigmoid(o) * tanh(seen), c


def dreamer_gru(layer, x, states, extras):
    sums = [a + b for a, b in zip(layer.pre(x), layer.rec(states[0]), strict=True)]
    reset, candidate, update = normed(sums, extras["gain"], extras["shift"], 1e-3)
    return (torch.lerp(states[0], tanh(sigmoid(reset) * candidate), sigmoid(update - 1)),)


SHIPPED = {
    "elman": Shipped(cells.elman, elman),
    "gru": Shipped(cells.gru, gru),
    "lstm": Shipped(cells.lstm, lstm),
    "peephole_lstm": Shipped(
        cells.peephole_lstm, peephole_lstm, {"peep_i": "unit", "peep_f": "unit", "peep_o": 0.3}
    ),
    "coupled_lstm": Shipped(cells.coupled_lstm, coupled_lstm),
    "minimal_gated": Shipped(cells.minimal_gated, minimal_gated),
    "leaky": Shipped(cells.leaky, rate(torch.tanh), {"alpha": 0.3, "noise": "noise"}),
    "leaky_rectified": Shipped(
        cells.leaky_rectified, rate(torch.relu), {"alpha": "unit", "noise": "noise"}
    ),
    "leaky_potential": Shipped(
        cells.leaky_potential, leaky_potential, {"alpha": "unit", "noise": "noise"}
    ),
    "continuous_time": Shipped(cells.continuous_time, continuous_time, {"dt": "dt", "tau": "unit"}),
    "zoneout_lstm": Shipped(
        cells.zoneout_lstm,
        zoneout_lstm,
        {"zone_h": "zone_h", "zone_c": 0.2},
        masks=("zone_h",),
    ),
    "zoneout_gru": Shipped(cells.zoneout_gru, zoneout_gru, {"zone_h": "keep"}, masks=("keep",)),
    "dropout_lstm": Shipped(cells.dropout_lstm, dropout_lstm, {"mask": "mask"}, masks=("mask",)),
    "update_dropout_lstm": Shipped(
        cells.update_dropout_lstm, update_dropout_lstm, {"mask": "mask"}
    ),
    "held_gru": Shipped(cells.held_gru, held(gru), {"mask": "mask"}, masks=("mask",)),
    "held_lstm": Shipped(cells.held_lstm, held(lstm), {"mask": "mask"}, masks=("mask",)),
    "layer_norm_gru": Shipped(
        cells.layer_norm_gru,
        layer_norm_gru,
        {"gain_x": "gate", "gain_h": "gate", "shift_x": 0.2, "shift_h": "gate"},
    ),
    "layer_norm_lstm": Shipped(
        cells.layer_norm_lstm,
        layer_norm_lstm,
        {"gain_x": 1.5, "gain_h": "gate", "shift": "gate", "gain_c": "unit", "shift_c": "unit"},
    ),
    "dreamer_gru": Shipped(cells.dreamer_gru, dreamer_gru, {"gain": "gate", "shift": "gate"}),
    "independent": Shipped(cells.independent, independent, {"weight": "unit"}),
    "decay_gru": Shipped(cells.decay_gru, decay_gru, {"gap": "gap", "rate": "unit", "offset": 0.1}),
}


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)
