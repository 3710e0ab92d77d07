"""The reference's loops over time, layers and windows; a cell is any function of one step.

:func:`unroll` carries the states through time, gates the gradient and resets, and knows nothing of
the cell's arithmetic. Windows that overlap are what their definition says: :func:`run_windows` runs
the network again on each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastbptt._gates import Clip, Gate
from fastbptt.truncation import Gated, Randomized, Truncation, Windowed

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

    def of(self, *index: slice | Tensor) -> PerStep:
        """The same of some steps, or of some steps and sequences."""
        kappa, resets = (None if x is None else x[index] for x in self[:2])
        by_step = {n: tuple(x[index] for x in getattr(self, n)) for n in _BY_STEP}
        return self._replace(kappa=kappa, resets=resets, **by_step)


# A network: (input [T, B, I], states, what goes with the steps) -> output [T, B, ...], last states
Stack = Callable[[Tensor, States, PerStep], tuple[Tensor, States]]


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


def run_windows(
    stack: Stack,
    input: Tensor,
    states: States,
    per_step: PerStep,
    truncation: Windowed,
) -> tuple[Tensor, States]:
    """The network (one direction) again on every window, from the states of one full run.

    Each step's output is that of the window whose loss it is in, so that ordinary autograd on the
    whole gives the truncated gradient. The last states are the last window's. Only windows that
    begin at step 0 begin with the caller's states, and only through these reach a given ``hx``.
    """
    T, k1, k2 = input.size(0), truncation.k1, truncation.k2
    begins = {first: max(0, first - (k2 - k1)) for first in range(0, T, k1)}
    pieces, entering = [], {0: states}
    with torch.no_grad():  # from where one window begins to where the next one does
        for begin, end in pairwise(sorted({*begins.values(), T})):
            piece = slice(begin, end)
            output, entering[end] = stack(input[piece], entering[begin], per_step.of(piece))
            pieces.append(output)
    outputs = list(torch.cat(pieces))
    for first, begin in begins.items():
        end = min(first + k1, T)
        window = slice(begin, end)
        output, last = stack(input[window], entering[begin], per_step.of(window))
        counted = end - 1 if truncation.last_only else first
        outputs[counted:end] = output[counted - begin :]
    return torch.stack(outputs), last


def run_side_by_side(
    stack: Stack,
    input: Tensor,
    states: States,
    per_step: PerStep,
    truncation: Windowed,
) -> tuple[Tensor, States]:
    """Windows that do not overlap: the state is cut between them, in both directions alike."""
    T, B, k = *input.shape[:2], truncation.k1
    t = torch.arange(T, device=input.device)
    kappa = ((t % k > 0) | (t == 0)).to(input.dtype).unsqueeze(1).expand(T, B)
    output, last = stack(input, states, per_step._replace(kappa=kappa))
    if truncation.last_only:
        ends = (t % k == k - 1) | (t == T - 1)
        output = torch.where(ends[:, None, None], output, output.detach())
    return output, last


def run_padded(
    stack: Stack,
    input: Tensor,
    states: States,
    per_step: PerStep,
    truncation: Truncation | None,
) -> tuple[Tensor, States]:
    """A padded batch, input [T, B, I], whose gates (if any) are in ``per_step`` already."""
    if not isinstance(truncation, Windowed):
        return stack(input, states, per_step)
    run = run_windows if truncation.k1 < truncation.k2 else run_side_by_side
    return run(stack, input, states, per_step, truncation)


def run_layout(
    stack: Stack,
    input: Tensor | PackedSequence,
    states: States,
    truncation: Truncation | None,
    resets: Tensor | None = None,
    masks: Sequence[Tensor] = (),
    inputs: Sequence[Tensor] = (),
    *,
    reset_to: Sequence[Tensor] = (),
    clip_grad: float | None = None,
    batch_first: bool = False,
    bidirectional: bool = False,
    by_rows: bool = False,
) -> tuple[Tensor | PackedSequence, States]:
    """A network over a module's input, padded, unbatched or packed, as its ``forward`` takes it.

    Args:
        stack: the network.
        input, states, resets: as the module's call; states without B if the input has none.
        truncation: what ``as_truncation`` gives.
        masks: the dropout after each layer but the last, in the shape of the output (of its data,
            if packed).
        inputs: what the cells take at each step, [T, B, L*D, ...] in the caller's order of
            sequences; time comes first, and B is 1 without a batch.
        reset_to: what the states become at a reset, like ``inputs``; empty: zeros.
        clip_grad: the bound of the gradient that passes from a step to the one before, or None.
        batch_first: whether B leads in a padded input, in resets and in masks.
        bidirectional: whether the network is.
        by_rows: whether the network may be given a packed batch as it is, rows [N, I].

    Raises:
        TypeError: ``resets`` is not bool.
        ValueError: gates or resets have another shape, or windows overlap (k1 < k2) in a
            bidirectional network.
    """
    if bidirectional and isinstance(truncation, Windowed) and truncation.k1 < truncation.k2:
        raise ValueError(
            f"truncation={truncation} has windows that overlap, so the module must not be "
            "bidirectional: in reverse no state is known where a window begins"
        )
    masks = tuple(masks)
    rest = PerStep(inputs=tuple(inputs), reset_to=tuple(reset_to), clip_grad=clip_grad)
    if isinstance(input, PackedSequence):
        overlap = isinstance(truncation, Windowed) and truncation.k1 < truncation.k2
        run = _run_rows if by_rows and not overlap else _run_packed
        return run(stack, input, states, truncation, resets, masks, rest)
    is_unbatched = input.dim() == 2  # a batch of one

    def time_first(x: Tensor) -> Tensor:
        if is_unbatched:
            return x.unsqueeze(1)
        return x.transpose(0, 1) if batch_first else x

    input, masks = time_first(input), tuple(time_first(mask) for mask in masks)
    if resets is not None and resets.dim() == 2:
        resets = time_first(resets)
    if is_unbatched:
        states = tuple(state.unsqueeze(1) for state in states)
    kappa, resets = by_step(*input.shape[:2], truncation, resets, input.device)[:2]
    per_step = rest._replace(kappa=kappa, resets=resets, masks=masks)
    output, states = run_padded(stack, input, states, per_step, truncation)
    if is_unbatched:
        return output.squeeze(1), tuple(state.squeeze(1) for state in states)
    return output.transpose(0, 1) if batch_first else output, states


def _by_length(
    sorted_indices: Tensor | None, states: States, per_step: PerStep
) -> tuple[States, PerStep]:
    """In the order of a packed batch's data, what is in the caller's order of sequences."""
    if sorted_indices is None:
        return states, per_step
    states = tuple(state.index_select(1, sorted_indices) for state in states)
    return states, per_step.of(slice(None), sorted_indices)


def _run_packed(
    stack: Stack,
    input: PackedSequence,
    states: States,
    truncation: Truncation | None,
    resets: Tensor | None,
    masks: tuple[Tensor, ...],
    rest: PerStep,
) -> tuple[PackedSequence, States]:
    """Every sequence by itself, as a batch of one: what packing means, without its tricks."""
    data, batch_sizes, sorted_indices, unsorted_indices = input
    sizes = batch_sizes.tolist()
    kappa, resets = by_step(len(sizes), sizes[0], truncation, resets, data.device)[:2]
    states, per_step = _by_length(sorted_indices, states, rest._replace(kappa=kappa, resets=resets))

    # Step t of sequence b is row starts[t] + b of data, as long as the sequence lasts.
    starts = [sum(sizes[:t]) for t in range(len(sizes))]
    all_rows, outputs, finals = [], [], []
    for b in range(sizes[0]):
        rows = [start + b for start, size in zip(starts, sizes, strict=True) if b < size]
        initial = tuple(state[:, b : b + 1] for state in states)
        its = per_step.of(slice(len(rows)), slice(b, b + 1))
        its = its._replace(masks=tuple(mask[rows].unsqueeze(1) for mask in masks))
        output, last = run_padded(stack, data[rows].unsqueeze(1), initial, its, truncation)
        all_rows += rows
        outputs.append(output.squeeze(1))
        finals.append(last)

    back = torch.tensor(all_rows, device=data.device).argsort()  # from sequence by sequence to data
    output = PackedSequence(torch.cat(outputs)[back], batch_sizes, sorted_indices, unsorted_indices)
    states = tuple(torch.cat(of_all, dim=1) for of_all in zip(*finals, strict=True))
    if unsorted_indices is not None:
        states = tuple(state.index_select(1, unsorted_indices) for state in states)
    return output, states


def _run_rows(
    stack: Stack,
    input: PackedSequence,
    states: States,
    truncation: Truncation | None,
    resets: Tensor | None,
    masks: tuple[Tensor, ...],
    rest: PerStep,
) -> tuple[PackedSequence, States]:
    """A packed batch as it is; windows lie side by side."""
    data, batch_sizes, sorted_indices, unsorted_indices = input
    row, there = rows_of(batch_sizes)
    kappa, resets = by_step(*row.shape, truncation, resets, data.device)[:2]
    states, per_step = _by_length(sorted_indices, states, rest._replace(kappa=kappa, resets=resets))
    per_step = per_step.of(there.to(data.device))._replace(masks=masks, batch_sizes=batch_sizes)
    is_end = None
    if isinstance(truncation, Windowed):
        t, b = there.nonzero(as_tuple=True)
        k = min(truncation.k1, len(batch_sizes))
        kappa = ((t % k > 0) | (t == 0)).to(data.device, data.dtype)
        per_step = per_step._replace(kappa=kappa)
        if truncation.last_only:
            is_end = (t % k == k - 1) | (t == there.sum(0)[b] - 1)
    output, states = stack(data, states, per_step)
    if is_end is not None:
        output = torch.where(is_end[:, None].to(data.device), output, output.detach())
    if unsorted_indices is not None:
        states = tuple(state.index_select(1, unsorted_indices) for state in states)
    return PackedSequence(output, *input[1:]), states


def by_step(
    T: int, B: int, truncation: Truncation | None, resets: Tensor | None, device: torch.device
) -> PerStep:
    """Gates (drawn here, once, if they are random) and resets as [T, B]; time comes first."""
    if isinstance(truncation, Randomized):
        truncation = truncation.draw(T, B)
    kappa = truncation.kappa if isinstance(truncation, Gated) else None
    if resets is not None and resets.dtype != torch.bool:
        raise TypeError(f"resets must be bool, got {resets.dtype}")
    for name, value in (("kappa", kappa), ("resets", resets)):
        if value is not None and value.shape not in ((T,), (T, B)):
            raise ValueError(
                f"{name} must have shape {(T,)} or {(T, B)} (time, batch), got {tuple(value.shape)}"
            )
    wide = (
        None if x is None else (x.unsqueeze(1).expand(T, B) if x.dim() == 1 else x).to(device)
        for x in (kappa, resets)
    )
    return PerStep(*wide)
