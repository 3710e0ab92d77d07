"""Networks of a hand-written step, run again on every window: what fastbptt.Recurrent must equal.

Shares nothing with the package but the parameters' names and the truncations' numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastbptt import Gated, Randomized

Step = Callable[..., tuple[Tensor, ...]]  # (layer, x, states, extras) -> the new states


class Layer:
    """A layer and direction's parameters: w, u, b and c, as the formulas call them."""

    def __init__(self, net, suffix):
        names = {"w": "weight_ih", "u": "weight_hh", "b": "bias_ih", "c": "bias_hh"}
        for short, name in names.items():
            setattr(self, short, getattr(net, name + suffix, None))
        self.net, self.suffix = net, suffix

    def pre(self, x):
        return list(torch.nn.functional.linear(x, self.w, self.b).chunk(self.net.cell.gates, -1))

    def rec(self, h):
        return list(torch.nn.functional.linear(h, self.u, self.c).chunk(self.net.cell.gates, -1))

    def extras(self, inputs, i, t):
        """The cell's arguments at a step, from the module's numbers and parameters, and inputs."""
        values = {}
        for name in self.net.cell.extras:
            if name in inputs:
                values[name] = inputs[name][i, t]
            elif name in self.net.extras:
                values[name] = self.net.extras[name]
            else:
                values[name] = getattr(self.net, name + self.suffix)
        return values


def _clipped(state, bound):
    if not state.requires_grad:
        return state
    state = state * 1
    state.register_hook(lambda gradient: gradient.clamp(-bound, bound))
    return state


def _on_steps(net, step, x, states, resets, kappa, reset_to, clip, cuts, inputs, begin, end):
    """Output, last states and all states of the steps begin to end - 1; states [L*D, B, H]."""
    D = 2 if net.bidirectional else 1
    ends = ("", "_reverse")[:D]
    below = {t: x[t] for t in range(begin, end)}
    finals, every = [], []
    for number in range(net.num_layers):
        above = []
        for d in range(D):
            i = number * D + d
            layer = Layer(net, f"_l{number}{ends[d]}")
            s = tuple(state[i] for state in states)
            own = {}
            for t in range(begin, end) if d == 0 else range(end - 1, begin - 1, -1):
                crossed = t + d
                if crossed < end:
                    if crossed in cuts and begin < crossed:
                        s = tuple(each.detach() for each in s)
                    if kappa is not None:
                        k = kappa[crossed][:, None]
                        s = tuple(k * each + (1 - k) * each.detach() for each in s)
                    if resets is not None:
                        at = resets[crossed][:, None]
                        new = [r[i, crossed] for r in reset_to] if reset_to else [0.0] * len(s)
                        s = tuple(torch.where(at, n, o) for n, o in zip(new, s, strict=True))
                if clip is not None:
                    s = tuple(_clipped(each, clip) for each in s)
                s = own[t] = step(layer, below[t], s, layer.extras(inputs, i, t))
            above.append({t: own[t][net.cell.output] for t in own})
            finals.append(s)
            every.append(
                [torch.stack([own[t][n] for t in range(begin, end)]) for n in range(len(s))]
            )
        below = {t: torch.cat([each[t] for each in above], -1) for t in range(begin, end)}
    output = torch.stack([below[t] for t in range(begin, end)])
    last = [torch.stack(of_all) for of_all in zip(*finals, strict=True)]
    return output, last, [torch.stack(of_all) for of_all in zip(*every, strict=True)]


def run(net, step, x, states, truncation=None, resets=None, inputs=None, reset_to=(), clip=None):
    """Output [T, B, D*H], the last states [L*D, B, H] each, all states [L*D, T, B, H] each.

    resets and kappa [T] or [T, B]; inputs [L*D, T, B, H or 1] by name; reset_to [L*D, T, B, H] for
    each state.
    """
    T, B = x.shape[:2]
    inputs = inputs or {}
    if resets is not None and resets.dim() == 1:
        resets = resets[:, None].expand(T, B)
    if isinstance(truncation, int):
        k1 = k2 = truncation
    else:
        k1, k2 = getattr(truncation, "k1", T), getattr(truncation, "k2", T)
    last_only = getattr(truncation, "last_only", False)
    kappa = None
    if isinstance(truncation, Randomized):
        truncation = truncation.last
    if isinstance(truncation, Gated):
        kappa = truncation.kappa.to(x)
        kappa = kappa[:, None].expand(T, B) if kappa.dim() == 1 else kappa
    rest = (resets, kappa, reset_to, clip)
    if k1 == k2:
        cuts = set(range(k1, T, k1))
        output, last, every = _on_steps(net, step, x, states, *rest, cuts, inputs, 0, T)
        if last_only:
            ends = [t for t in range(T) if t % k1 == k1 - 1 or t == T - 1]
            output = _only(output, ends, 0)
            every = [_only(each, ends, 1) for each in every]
        return output, last, every
    entering = [states]
    with torch.no_grad():
        for t in range(T):
            entering.append(_on_steps(net, step, x, entering[t], *rest, set(), inputs, t, t + 1)[1])
        plain, _, plain_every = _on_steps(net, step, x, states, *rest, set(), inputs, 0, T)
    output = list(plain)
    every = [list(each.unbind(1)) for each in plain_every]
    for first in range(0, T, k1):
        begin, end = max(0, first - (k2 - k1)), min(T, first + k1)
        s = entering[begin]
        if begin > 0:
            s = [each.detach() for each in s]
        own, last, own_every = _on_steps(net, step, x, s, *rest, set(), inputs, begin, end)
        for t in range(first, end):
            if t == end - 1 or not last_only:
                output[t] = own[t - begin]
                for each, its in zip(every, own_every, strict=True):
                    each[t] = its[:, t - begin]
    return torch.stack(output), last, [torch.stack(each, 1) for each in every]


def _only(x, steps, axis):
    """Detached but for some steps."""
    parts = x.unbind(axis)
    return torch.stack([p if t in steps else p.detach() for t, p in enumerate(parts)], axis)
