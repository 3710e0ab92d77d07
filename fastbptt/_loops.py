"""The reference's loops over time and layers; a cell is any function of one step.

:func:`unroll` carries the states through time, gates the gradient and resets, and knows nothing of
the cell's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastbptt._gates import Clip, Gate

States = tuple[Tensor, ...]  # what a cell hands to the next step: (h,) or (h, c)
Cell = Callable[..., States]  # cell(x, states, *weights, *inputs) -> the next states


_BY_STEP = ("masks", "inputs", "reset_to")


class PerStep(NamedTuple):
    """What goes with the steps of a call, time first; None or empty where it has nothing of it."""

    kappa: Tensor | None = None  # [T, B], the gate on the gradient between the steps t - 1 and t
    resets: Tensor | None = None  # [T, B], True where the state entering step t is zeros
    masks: tuple[Tensor, ...] = ()  # [T, B, D*R] each, the dropout after each layer but the last
    inputs: tuple[Tensor, ...] = ()  # [T, B, L*D, ...] each, what else the cells take at a step
    batch_sizes: Tensor | None = None  # of a packed batch, where rows [N] take the place of [T, B]
    reset_to: tuple[Tensor, ...] = ()  # [T, B, L*D, ...] each, what the states are then, not zeros
    clip_grad: float | None = None  # the bound of what goes back from a step to the one before

    def map(self, function: Callable[[Tensor], Tensor]) -> PerStep:
        """The same with a function of each tensor, all of which have time first."""
        kappa, resets = (None if x is None else function(x) for x in self[:2])
        by_step = {n: tuple(function(x) for x in getattr(self, n)) for n in _BY_STEP}
        return self._replace(kappa=kappa, resets=resets, **by_step)

    def of(self, *index: slice | Tensor) -> PerStep:
        """The same of some steps, or of some steps and sequences."""
        return self.map(lambda x: x[index])


def unroll(
    cell: Cell,
    input: Tensor,
    states: States,
    weights: Sequence[Tensor | None],
    per_step: PerStep,
    reverse: bool = False,
) -> tuple[States, States]:
    """One layer in one direction: input [T, B, I], states [B, ...] -> all [T, B, ...], the last.

    The step's inputs are those of this layer and direction, [T, B, ...].

    Gates and resets stand between steps: those of t between t - 1 and t, whichever way the states
    cross. Those of 0 stand before the first step, where the reverse direction never comes; what
    it begins with, at step T - 1, is neither gated nor reset. What goes back to the states that
    enter a step, the first one's and a reset's too, is clipped, and then gated.
    """
    T = input.size(0)
    if per_step.batch_sizes is not None:
        return _unroll_rows(cell, input, states, weights, per_step, reverse)
    every: list[States] = []
    for t in reversed(range(T)) if reverse else range(T):
        crossed = t + 1 if reverse else t  # the place in time between the last step and this one
        if crossed < T and per_step.kappa is not None:
            kappa = per_step.kappa[crossed].unsqueeze(-1)
            states = tuple(Gate.apply(state, kappa.to(state.dtype)) for state in states)
        if crossed < T and per_step.resets is not None:
            reset = per_step.resets[crossed].unsqueeze(-1)
            given = [each[crossed] for each in per_step.reset_to] or map(torch.zeros_like, states)
            states = tuple(
                torch.where(reset, new.to(s.dtype), s) for new, s in zip(given, states, strict=True)
            )
        if per_step.clip_grad is not None:
            states = tuple(Clip.apply(state, per_step.clip_grad) for state in states)
        states = cell(input[t], states, *weights, *(each[t] for each in per_step.inputs))
        every.append(states)
    if reverse:
        every.reverse()
    return tuple(torch.stack(of_all) for of_all in zip(*every, strict=True)), states


def _unroll_rows(
    cell: Cell,
    input: Tensor,
    states: States,
    weights: Sequence[Tensor | None],
    per_step: PerStep,
    reverse: bool,
) -> tuple[States, States]:
    """As unroll, of a packed batch's rows: every sequence by itself, without packing's tricks."""
    row, there = rows_of(per_step.batch_sizes)
    finished, alone, places = [], [], []
    for b in range(len(states[0])):
        own = row[:, b][there[:, b]].to(input.device)
        its = per_step._replace(masks=(), batch_sizes=None).of(own[:, None])
        initial = tuple(state[b : b + 1] for state in states)
        every, last = unroll(cell, input[own[:, None]], initial, weights, its, reverse)
        finished.append(last)
        alone.append(every)
        places.append(own)
    back = torch.cat(places).argsort()
    every = tuple(
        torch.cat([of_state.squeeze(1) for of_state in of_all])[back]
        for of_all in zip(*alone, strict=True)
    )
    return every, tuple(torch.cat(of_all) for of_all in zip(*finished, strict=True))


def rows_of(batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """A packed batch's row of each step and sequence, [T, B], and which of them there are."""
    there = torch.arange(int(batch_sizes[0])) < batch_sizes[:, None]
    return (there.flatten().cumsum(0) - 1).view(there.shape), there


def last_states(every: States, per_step: PerStep, reverse: bool) -> States:
    """The last of all states [T, B, ...] or, of a packed batch, [N, ...]."""
    if per_step.batch_sizes is None:
        return tuple(each[0 if reverse else -1] for each in every)
    row, there = rows_of(per_step.batch_sizes)
    ends = row[0] if reverse else row.gather(0, there.sum(0)[None] - 1)[0]
    return tuple(each[ends.to(each.device)] for each in every)


Unroll = Callable[..., tuple[States, States]]  # unroll, or what takes its place


def stack_layers(
    cell: Cell,
    weights: Sequence[Sequence[Tensor | None]],
    directions: int,
    input: Tensor,
    states: States,
    per_step: PerStep,
    *,
    output_state: int = 0,
    with_states: bool = False,
    states_to: list[States] | None = None,
    unroll: Unroll = unroll,
) -> tuple[Tensor, States]:
    """All layers: input [T, B, I], states [L*D, B, ...] -> output [T, B, D*R], the last states.

    ``weights`` holds one sequence for each layer and direction, in the order of the states.
    ``output_state`` is the number of the state that is a layer's output. ``with_states`` has all
    states of all steps follow the output's features: the first of each layer and direction, then
    the second of each; ``states_to`` is given them instead, layer by layer. ``unroll`` runs a layer
    in one direction.
    """
    finals, kept = [], []
    for layer in range(len(weights) // directions):
        if layer > 0 and per_step.masks:
            input = input * per_step.masks[layer - 1]
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            initial = tuple(state[i] for state in states)
            own = per_step
            if per_step.inputs or per_step.reset_to:
                own = per_step._replace(
                    inputs=tuple(x.select(-2, i) for x in per_step.inputs),
                    reset_to=tuple(x.select(-2, i) for x in per_step.reset_to),
                )
            every, last = unroll(cell, input, initial, weights[i], own, direction == 1)
            outputs.append(every[output_state])
            finals.append(last)
            kept.append(every)
        # The next layer sees both directions, side by side.
        input = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
    if states_to is not None:
        states_to += kept
    if with_states:
        input = torch.cat([input, *(x for of_all in zip(*kept, strict=True) for x in of_all)], -1)
    return input, tuple(torch.stack(of_all) for of_all in zip(*finals, strict=True))
