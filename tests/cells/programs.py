"""Cells' programs, written by hand."""

from __future__ import annotations

import torch

from fastbptt import cells, layer_norm
from fastbptt._program import Leaf, Op, Program, Ref
from fastbptt._trace import trace


class Builder:
    """Collects the operations of a program."""

    def __init__(self, gates: int, states: int, *extras: str):
        self.leaves = (
            *(Leaf("pre", g) for g in range(gates)),
            *(Leaf("rec", g) for g in range(gates)),
            *(Leaf("state", k) for k in range(states)),
            *(Leaf("extra", name) for name in extras),
        )
        self.ops: list[Op] = []

    def __getitem__(self, leaf):
        return Ref(self.leaves.index(Leaf(*leaf)))

    def __getattr__(self, name: str):
        def append(*args):
            self.ops.append(Op(name, args))
            return Ref(len(self.leaves) + len(self.ops) - 1)

        return append

    def gate(self, g: int) -> Ref:
        return self.add(self["pre", g], self["rec", g])

    def program(self, *results) -> Program:
        return Program(self.leaves, tuple(self.ops), results)


def elman() -> Program:
    b = Builder(1, 1)
    return b.program(b.tanh(b.gate(0)))


def leaky() -> Program:
    b = Builder(1, 1, "alpha")
    h = b["state", 0]
    return b.program(b.add(h, b.mul(b["extra", "alpha"], b.sub(b.tanh(b.gate(0)), h))))


def gru() -> Program:
    b = Builder(3, 1)
    h = b["state", 0]
    r, z = b.sigmoid(b.gate(0)), b.sigmoid(b.gate(1))
    n = b.tanh(b.add(b["pre", 2], b.mul(r, b["rec", 2])))
    return b.program(b.add(n, b.mul(z, b.sub(h, n))))


def lstm() -> Program:
    b = Builder(4, 2)
    i, f, o = (b.sigmoid(b.gate(g)) for g in (0, 1, 3))
    c = b.add(b.mul(f, b["state", 1]), b.mul(i, b.tanh(b.gate(2))))
    return b.program(b.mul(o, b.tanh(c)), c)


def three_states() -> Program:
    """States of which the second is seen by W_hh, and the third by the first alone."""
    b = Builder(2, 3, "decay")
    x, y, z = (b["state", k] for k in range(3))
    u = b.tanh(b.add(b.gate(0), z))
    v = b.sigmoid(b.gate(1))
    x_next = b.add(b.mul(b.sigmoid(b["extra", "decay"]), x), b.mul(u, v))
    y_next = b.sub(b.mul(0.5, u), b.mul(y, v))
    return b.program(x_next, y_next, b.sin(b.mul(x_next, z)))


def masked() -> Program:
    """Holds the state where a mask says so, with other arguments by unit and by step."""
    b = Builder(1, 1, "mask", "noise", "scale")
    h = b["state", 0]
    held = b.lt(b["extra", "mask"], 0.5)
    value = b.add(b.mul(b["extra", "scale"], b.tanh(b.gate(0))), b["extra", "noise"])
    return b.program(b.where(held, h, b.minimum(b.maximum(value, -0.4), 0.7)))


def many_gates() -> Program:
    b = Builder(6, 1)
    sums = [b.mul(b.tanh(b.gate(g)), 0.1 * (g + 1)) for g in range(6)]
    total = sums[0]
    for term in sums[1:]:
        total = b.add(total, term)
    return b.program(total)


def independent() -> Program:
    """Units that do not see each other: no W_hh."""
    b = Builder(1, 1, "u")
    return b.program(b.relu(b.add(b["pre", 0], b.mul(b["extra", "u"], b["state", 0]))))


def every_operation() -> Program:
    """A chain through each function, of arguments in its domain."""
    b = Builder(1, 1)
    h, x = b["state", 0], b.gate(0)
    positive = b.add(b.square(x), 0.5)
    terms = [
        b.exp(b.mul(x, 0.5)),
        b.expm1(x),
        b.log(positive),
        b.log1p(positive),
        b.sqrt(positive),
        b.rsqrt(positive),
        b.reciprocal(positive),
        b.pow(positive, 1.5),
        b.erf(x),
        b.sin(x),
        b.cos(x),
        b.abs(x),
        b.neg(b.relu(x)),
        b.clamp(x, -0.5, 0.5),
        b.div(h, positive),
        b.mul(b.sign(x), b.sigmoid(h)),
        b.where(b.logical_and(b.gt(x, 0.0), b.logical_not(b.ge(x, 1.0))), h, b.mul(x, 2.0)),
        b.where(b.logical_or(b.le(x, -1.0), b.ne(h, h)), 1.0, b.mul(h, 0.5)),
        b.mul(b.eq(h, 0.0), x),
    ]
    total = terms[0]
    for term in terms[1:]:
        total = b.add(total, term)
    return b.program(b.tanh(b.mul(total, 0.2)))


def extrema() -> Program:
    """Of a gate and a state that may be equal."""
    b = Builder(1, 1)
    h, x = b["state", 0], b.gate(0)
    low, high = b.minimum(b.maximum(x, h), b.mul(x, 2.0)), b.maximum(b.abs(h), b.minimum(h, x))
    return b.program(b.add(b.mul(low, 0.5), b.mul(high, 0.25)))


def normalized(pre, rec, state, gain, shift):
    """Normalizations of all kinds: one after another, with numbers, of what is not used, chosen."""
    h, c = state
    x = layer_norm((pre[0], rec[0] * h, 0.5, c), gain, eps=1e-3)
    is_more = x[0] > x[2]
    y = layer_norm(rec[1] + x[0] * shift, bias=h)
    z = layer_norm((y, rec[1], x[1]), eps=0.1)
    w = layer_norm(c)
    return torch.where(is_more, z[1], z[0]) + w * z[2] + gain, torch.tanh(y) * c + w


def passing(pre, rec, state):
    """States that are others, or gates, and one that is nothing but a normalized value."""
    return state[1], layer_norm(state[0] + rec[0], eps=0.1), pre[0]


def twice(pre, rec, state):
    """A normalized value that is normalized again, and values of the first phase in the last."""
    a, b = layer_norm((pre[0] + rec[0], state[0]), eps=0.2)
    (q,) = layer_norm((layer_norm(a, eps=0.3),), eps=0.4)
    return (torch.tanh(q) + torch.sin(rec[1]) * torch.exp(-state[0] * state[0]) + rec[0] * 0.1,)


# The program, the state that W_hh sees, and what the extra arguments are by unit and step.
CASES = {
    "elman": (elman(), 0, ()),
    "leaky": (leaky(), 0, ("number",)),
    "leaky by unit": (leaky(), 0, ("unit",)),
    "gru": (gru(), 0, ()),
    "lstm": (lstm(), 0, ()),
    "three states": (three_states(), 1, ("unit",)),
    "masked": (masked(), 0, ("step", "unit and step", "unit")),
    "many gates": (many_gates(), 0, ()),
    "independent": (independent(), 0, ("unit",)),
    "every operation": (every_operation(), 0, ()),
    "extrema": (extrema(), 0, ()),
    "layer norm gru": (cells.layer_norm_gru.program, 0, ("unit",) * 12),
    "layer norm lstm": (cells.layer_norm_lstm.program, 0, ("number",) * 4 + ("unit",) * 10),
    "normalized": (trace(normalized, 2, 2, ("gain", "shift")), 1, ("unit", "step")),
    "passing": (trace(passing, 1, 3, ()), 1, ()),
    "twice": (trace(twice, 2, 1, ()), 0, ()),
}
