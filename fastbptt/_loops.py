"""The reference's loops over time, layers and windows; a cell is any function of one step.

:func:`unroll` carries the states through time, gates the gradient and resets, and knows nothing of
the cell's arithmetic. Windows that overlap are what their definition says: :func:`run_windows` runs
the network again on each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastbptt.truncation import Gated, Randomized, Truncation, Windowed

States = tuple[Tensor, ...]  # what a cell hands to the next step: (h,) or (h, c)
Cell = Callable[..., States]  # cell(x, states, *weights) -> the next states


class PerStep(NamedTuple):
    """What goes with the steps of a call, time first; None or empty where it has nothing of it."""

    kappa: Tensor | None = None  # [T, B], the gate on the gradient between the steps t - 1 and t
    resets: Tensor | None = None  # [T, B], True where the state entering step t is zeros
    masks: tuple[Tensor, ...] = ()  # [T, B, D*R] each, the dropout after each layer but the last

    def of(self, *index: slice | Tensor) -> PerStep:
        """The same of some steps, or of some steps and sequences."""
        kappa, resets = (None if x is None else x[index] for x in self[:2])
        return PerStep(kappa, resets, tuple(mask[index] for mask in self.masks))


# A network: (input [T, B, I], states, what goes with the steps) -> output, the last states
Stack = Callable[[Tensor, States, PerStep], tuple[Tensor, States]]


class _Gate(torch.autograd.Function):
    """The state as it is; its derivative times kappa, and zero where kappa is, even of a NaN."""

    generate_vmap_rule = True

    @staticmethod
    def forward(state: Tensor, kappa: Tensor) -> Tensor:
        return state.clone()

    @staticmethod
    def setup_context(
        ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor
    ) -> None:
        _, kappa = inputs
        ctx.save_for_backward(kappa)
        ctx.save_for_forward(kappa)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (kappa,) = ctx.saved_tensors
        return (kappa * grad).masked_fill(kappa == 0, 0), None

    @staticmethod
    def jvp(ctx: torch.autograd.function.FunctionCtx, state_t: Tensor, _: object) -> Tensor:
        (kappa,) = ctx.saved_tensors
        return (kappa * state_t).masked_fill(kappa == 0, 0)


def unroll(
    cell: Cell,
    input: Tensor,
    states: States,
    weights: Sequence[Tensor | None],
    per_step: PerStep,
    reverse: bool = False,
) -> tuple[Tensor, States]:
    """One layer in one direction: input [T, B, I], states [B, ...] -> all h [T, B, R], the last.

    Gates and resets stand between steps: those of t between t - 1 and t, whichever way the states
    cross. Those of 0 stand before the first step, where the reverse direction never comes; what
    it begins with, at step T - 1, is neither gated nor reset.
    """
    T = input.size(0)
    outputs: list[Tensor] = []
    for t in reversed(range(T)) if reverse else range(T):
        crossed = t + 1 if reverse else t  # the place in time between the last step and this one
        if crossed < T and per_step.kappa is not None:
            kappa = per_step.kappa[crossed].unsqueeze(-1)
            states = tuple(_Gate.apply(state, kappa.to(state.dtype)) for state in states)
        if crossed < T and per_step.resets is not None:
            reset = per_step.resets[crossed].unsqueeze(-1)
            states = tuple(torch.where(reset, torch.zeros_like(s), s) for s in states)
        states = cell(input[t], states, *weights)
        outputs.append(states[0])
    if reverse:
        outputs.reverse()
    return torch.stack(outputs), states


def stack_layers(
    cell: Cell,
    weights: Sequence[Sequence[Tensor | None]],
    directions: int,
    input: Tensor,
    states: States,
    per_step: PerStep,
) -> tuple[Tensor, States]:
    """All layers: input [T, B, I], states [L*D, B, ...] -> output [T, B, D*R], the last states.

    ``weights`` holds one sequence for each layer and direction, in the order of the states.
    """
    finals = []
    for layer in range(len(weights) // directions):
        if layer > 0 and per_step.masks:
            input = input * per_step.masks[layer - 1]
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            initial = tuple(state[i] for state in states)
            output, last = unroll(cell, input, initial, weights[i], per_step, direction == 1)
            outputs.append(output)
            finals.append(last)
        input = torch.cat(outputs, dim=-1)  # the next layer sees both directions, side by side
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
    outputs, entering = [], [states]  # of all layers, entering each step
    with torch.no_grad():
        for t in range(T):
            output, last = stack(input[t : t + 1], entering[t], per_step.of(slice(t, t + 1)))
            outputs.append(output[0])
            entering.append(last)
    for first in range(0, T, k1):
        begin, end = max(0, first - (k2 - k1)), min(first + k1, T)
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
    cuts = [0.0 if t > 0 and t % k == 0 else 1.0 for t in range(T)]
    kappa = torch.tensor(cuts, device=input.device).unsqueeze(1).expand(T, B)
    output, last = stack(input, states, per_step._replace(kappa=kappa))
    if truncation.last_only:
        ends = torch.tensor([t % k == k - 1 or t == T - 1 for t in range(T)], device=input.device)
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
