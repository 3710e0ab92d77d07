"""A layer of a compiled cell in one direction, whatever runs it: its arguments and results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastbptt import _codegen
from fastbptt._program import Program


class Arguments(NamedTuple):
    """Of a layer in one direction.

    Axes as in the kernels: T steps, B sequences, I inputs, H units, G gates. A packed batch has N
    rows in place of [T, B], those of step t from ``sum(batch_sizes[:t])`` on, ``batch_sizes[t]`` of
    them.
    """

    x: Tensor  # [T, B, I]
    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor | None  # [G*H, H]; None where the cell does not use it
    b_ih: Tensor | None  # [G*H]
    b_hh: Tensor | None  # [G*H]
    initial: Sequence[Tensor | None]  # for each state [B, H], or None: zeros
    extras: Sequence[Tensor] = ()  # each a number, [H], [T, B, H] or [T, B, 1]
    resets: Tensor | None = None  # bool [T, B]: the states that enter this step are zeros
    batch_sizes: Tensor | None = None  # int64 [T], of a packed batch
    direction: int = 1  # or -1: from the last step to the first
    reset_to: Sequence[Tensor] = ()  # for each state [T, B, H], what it is at a reset; else zeros


class Kept(NamedTuple):
    """What a forward pass leaves for its backward pass; the same tensor, or None: not needed."""

    pre: Tensor | None  # [N, G*H] the input's part of the gates
    values: Tensor | None  # [N, ...]


class Gradients(NamedTuple):
    """Of a layer's arguments; None where it is not wanted, or there is no such argument."""

    x: Tensor | None
    w_ih: Tensor | None
    w_hh: Tensor | None
    b_ih: Tensor | None
    b_hh: Tensor | None
    initial: list[Tensor | None]
    extras: list[Tensor | None]
    reset_to: list[Tensor | None]


class Layer:
    """The recurrence of one direction of a layer of a compiled cell."""

    def __init__(self, program: Program, recurrent: int):
        self.program = program
        self.recurrent = recurrent
        self.shape = _codegen.shape_of(program)

    def forward(self, of: Arguments, keep: bool = True) -> tuple[list[Tensor], list[Tensor], Kept]:
        """Every state after every step, [T, B, H] each, and after the last, [B, H] each.

        And what ``backward`` needs, if ``keep``.
        """
        raise NotImplementedError

    def backward(
        self,
        of: Arguments,
        states: Sequence[Tensor],
        kept: Kept,
        d_states: Sequence[Tensor | None],
        d_last: Sequence[Tensor | None] = (),
        kappa: Tensor | None = None,
        clip_grad: float | None = None,
        wanted: Gradients | None = None,
    ) -> Gradients:
        """The gradients of the arguments of ``forward``.

        Those of the extras and of ``reset_to`` are [T, B, H] each, or [H] of an extra that all rows
        have alike, to be summed by who gave fewer numbers.

        Args:
            of: the same.
            states, kept: what ``forward`` gave.
            d_states: for each state [T, B, H], or None: zeros.
            d_last: for each state [B, H], or None: zeros; or none of them.
            kappa: [T, B], what of a gradient passes between a step and the one before it, or None:
                all. At a reset nothing passes.
            clip_grad: the bound of what comes to the states that enter a step, before kappa.
            wanted: true for the gradients that are wanted; None: all.
        """
        raise NotImplementedError

    def _all(self, of: Arguments) -> Gradients:
        """All that there are, as ``wanted`` has them."""
        counts = self.program.states, len(self.program.extras), len(of.reset_to)
        return Gradients(*[True] * 5, *([True] * count for count in counts))
