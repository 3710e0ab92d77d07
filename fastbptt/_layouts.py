"""A network over what a module is given: padded, unbatched or packed, and in windows.

Windows that overlap are what their definition says: :func:`run_windows` runs the network again on
each of them. :func:`run_windows_together` does the same in one run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastbptt._loops import PerStep, States, rows_of
from fastbptt.truncation import Gated, Randomized, Truncation, Windowed

# A network: (input [T, B, I], states, what goes with the steps) -> output [T, B, ...], last states
Stack = Callable[[Tensor, States, PerStep], tuple[Tensor, States]]


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


def run_windows_together(
    stack: Stack,
    input: Tensor,
    states: States,
    per_step: PerStep,
    truncation: Windowed,
) -> tuple[Tensor, States]:
    """As :func:`run_windows`, with the windows as sequences of one batch.

    ``stack`` takes ``states_to`` too, as :func:`fastbptt._loops.stack_layers` does. A window that
    begins at step 0 goes on after its loss, to be as long as the others: no gradient comes from
    there. That of the last steps may be shorter, and runs by itself.
    """
    T, B = input.shape[:2]
    k1, k2 = truncation.k1, truncation.k2
    every: list[States] = []
    with torch.no_grad():
        outputs, _ = stack(input, states, per_step, states_to=every)
        after = [torch.stack(of_all, 1) for of_all in zip(*every, strict=True)]  # [T, L*D, B, ...]

    def entering(begins: Sequence[int]) -> States:
        return tuple(
            torch.cat([own[t - 1] if t > 0 else given for t in begins], 1)
            for own, given in zip(after, states, strict=True)
        )

    begins = [max(0, first - (k2 - k1)) for first in range(0, T, k1)]
    length = min(k2, T)
    count = sum(begin + length <= T for begin in begins)
    if count > 0:
        # Made on the device, which nothing here waits for.
        arange = partial(torch.arange, device=input.device)
        begin = (arange(0, T, k1) - (k2 - k1)).clamp(min=0)
        steps = (begin[:count] + arange(length)[:, None]).flatten()

        def of_windows(x: Tensor) -> Tensor:
            return x.index_select(0, steps).view(length, count * B, *x.shape[2:])

        batch = per_step.map(of_windows)
        output, last = stack(of_windows(input), entering(begins[:count]), batch)
        last = tuple(state[:, -B:] for state in last)
        # The steps whose outputs count, and their places in [length, count].
        t = arange(min(count * k1, T))
        if truncation.last_only:
            t = (arange(0, T, k1)[:count] + k1).clamp(max=T) - 1
        place = (t - begin[t // k1]) * count + t // k1
        counted = output.reshape(length * count, B, -1).index_select(0, place)
        outputs = outputs.index_copy(0, t, counted)
    if count < len(begins):
        rest = slice(begins[-1], T)
        output, last = stack(input[rest], entering(begins[-1:]), per_step.of(rest))
        first = T - 1 if truncation.last_only else k1 * count
        outputs = torch.cat([outputs[:first], output[first - begins[-1] :]])
    return outputs, last


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
    windows: Callable[..., tuple[Tensor, States]] = run_windows,
) -> tuple[Tensor, States]:
    """A padded batch, input [T, B, I], whose gates (if any) are in ``per_step`` already.

    ``windows`` runs those of a truncation that overlap.
    """
    if not isinstance(truncation, Windowed):
        return stack(input, states, per_step)
    run = windows if truncation.k1 < truncation.k2 else run_side_by_side
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
        by_rows: whether the network may be given a packed batch as it is, rows [N, I], and is
            quicker with many sequences at once.

    Raises:
        TypeError: ``resets`` is not bool.
        ValueError: gates or resets have another shape, or windows overlap (k1 < k2) in a
            bidirectional network.
    """
    overlap = isinstance(truncation, Windowed) and truncation.k1 < truncation.k2
    if bidirectional and overlap:
        raise ValueError(
            f"truncation={truncation} has windows that overlap, so the module must not be "
            "bidirectional: in reverse no state is known where a window begins"
        )
    masks = tuple(masks)
    rest = PerStep(inputs=tuple(inputs), reset_to=tuple(reset_to), clip_grad=clip_grad)
    windows = run_windows_together if by_rows else run_windows
    if isinstance(input, PackedSequence):
        run = _run_rows if by_rows and not overlap else partial(_run_packed, windows)
        output, states = run(stack, input, states, truncation, resets, masks, rest)
        if input.unsorted_indices is not None:
            states = tuple(state.index_select(1, input.unsorted_indices) for state in states)
        return PackedSequence(output, *input[1:]), states
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
    output, states = run_padded(stack, input, states, per_step, truncation, windows)
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
    windows: Callable[..., tuple[Tensor, States]],
    stack: Stack,
    input: PackedSequence,
    states: States,
    truncation: Truncation | None,
    resets: Tensor | None,
    masks: tuple[Tensor, ...],
    rest: PerStep,
) -> tuple[Tensor, States]:
    """Every sequence by itself, as a batch of one: what packing means, without its tricks.

    Returns output and states in the order of the data.
    """
    data, batch_sizes, sorted_indices, _ = input
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
        output, last = run_padded(stack, data[rows].unsqueeze(1), initial, its, truncation, windows)
        all_rows += rows
        outputs.append(output.squeeze(1))
        finals.append(last)

    back = torch.tensor(all_rows, device=data.device).argsort()  # from sequence by sequence to data
    states = tuple(torch.cat(of_all, dim=1) for of_all in zip(*finals, strict=True))
    return torch.cat(outputs)[back], states


def _run_rows(
    stack: Stack,
    input: PackedSequence,
    states: States,
    truncation: Truncation | None,
    resets: Tensor | None,
    masks: tuple[Tensor, ...],
    rest: PerStep,
) -> tuple[Tensor, States]:
    """A packed batch as it is; windows lie side by side. Returns as :func:`_run_packed`."""
    data, batch_sizes, sorted_indices, _ = input
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
    return output, states


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
