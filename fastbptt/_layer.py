"""A layer of a compiled cell in one direction, whatever runs it: its arguments and results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
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
    extras: Sequence[Tensor | float] = ()  # each a number, [H], [T, B, H] or [T, B, 1]
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


class Given(NamedTuple):
    """What a backward pass is given, in one piece each; see :meth:`Layer.backward`."""

    d_states: list[Tensor | None]
    d_last: list[Tensor | None]
    kappa: Tensor | None
    clip_grad: float  # 0: none


class Layout:
    """The arguments of a call as the kernels read them: side by side, with their sizes.

    Attributes:
        sizes: T, B, N (rows), I, H and the direction.
        tensors: what is there once, by name, or None; of a packed batch also where its steps begin.
        initial, extras, reset_to: of each, where they are given.
        strides: of each extra by row and by unit.
        reset_strides: of each state of ``reset_to`` by row and by sequence.
    """

    def __init__(self, program: Program, of: Arguments):
        self._names = program.extras
        x, rows = of.x.contiguous(), of.x.shape[:-1]
        H = of.w_ih.shape[0] // program.gates
        offsets, batch_sizes = None, of.batch_sizes
        if batch_sizes is None:
            T, B = rows
        else:
            batch_sizes = batch_sizes.to(torch.int64).contiguous()
            offsets = torch.zeros(len(batch_sizes) + 1, dtype=torch.int64)
            torch.cumsum(batch_sizes, 0, out=offsets[1:])
            T, B = len(batch_sizes), int(batch_sizes[0])
        self.sizes = dict(T=T, B=B, N=rows.numel(), I=x.shape[-1], H=H, direction=of.direction)
        self.tensors = dict(
            offsets=offsets,
            batch_sizes=batch_sizes,
            resets=of.resets,
            input=x,
            w_ih=of.w_ih,
            w_hh=of.w_hh,
            b_ih=of.b_ih,
            b_hh=of.b_hh,
        )
        for name, tensor in self.tensors.items():
            self.tensors[name] = None if tensor is None else tensor.contiguous()
        self.extras, self.strides = self._read_extras(of.extras, x, H)
        self.initial = [None if h is None else h.contiguous() for h in of.initial]
        self.reset_to, self.reset_strides = [], []
        for value in of.reset_to:
            self._add_reset_to(value.detach(), is_packed=batch_sizes is not None)

    def _add_reset_to(self, value: Tensor, is_packed: bool) -> None:
        """With strides by row and by sequence, where it is the same at all steps."""
        H = value.shape[-1]
        if is_packed or value.stride(0) > 0:
            self.reset_strides += [H, 0]
        else:
            value = value[0]
            self.reset_strides += [0, H]
        self.reset_to.append(value.contiguous())

    def _read_extras(
        self, extras: Sequence[Tensor | float], x: Tensor, H: int
    ) -> tuple[list[Tensor], list[int]]:
        """As tensors, and their strides by row and by unit."""
        tensors, strides, rows = [], [], x.shape[:-1]
        for name, extra in zip(self._names, extras, strict=True):
            if not isinstance(extra, Tensor) or (extra.dim() == 0 and extra.device != x.device):
                extra = x.new_full((), float(extra))
            extra = extra.to(x.dtype).contiguous()
            shape = extra.shape
            if shape == () or shape == (1,):
                strides += [0, 0]
            elif shape == (H,):
                strides += [0, 1]
            elif shape == (*rows, H):
                strides += [H, 1]
            elif shape == (*rows, 1):
                strides += [1, 0]
            else:
                raise ValueError(
                    f"{name} must be a number, [{H}], {[*rows, H]} or {[*rows, 1]}, "
                    f"got {list(shape)}"
                )
            tensors.append(extra)
        return tensors, strides


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
        layout = Layout(self.program, of)
        x, shape = of.x, self.shape
        N, H, G = layout.sizes["N"], layout.sizes["H"], self.program.gates
        states = [x.new_empty(*x.shape[:-1], H) for _ in range(self.program.states)]
        last = [x.new_empty(layout.sizes["B"], H) for _ in states]
        pre = values = None
        if keep and (shape.reads_pre or (shape.fits_pre and shape.kept > 0)):
            pre = x.new_empty(N, G * H)
        width = shape.kept * H + 2 * len(shape.norms)
        if keep and width > 0:
            values = pre if shape.fits_pre else x.new_empty(N, width)
        kept = Kept(pre, values)
        self._run_forward(layout, states, last, kept)
        return states, last, kept

    def backward(
        self,
        of: Arguments,
        states: Sequence[Tensor],
        kept: Kept,
        d_states: Sequence[Tensor | None],
        d_last: Sequence[Tensor | None] | None = None,
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
            d_last: for each state [B, H], or None: zeros.
            kappa: [T, B], what of a gradient passes between a step and the one before it, or None:
                all. At a reset nothing passes.
            clip_grad: the bound of what comes to the states that enter a step, before kappa.
            wanted: true for the gradients that are wanted; None: all.
        """
        layout, x, program = Layout(self.program, of), of.x, self.program
        if wanted is None:
            yes = True
            wanted = Gradients(
                *[yes] * 5,
                [yes] * program.states,
                [yes] * len(program.extras),
                [yes] * len(of.reset_to),
            )
        # A sequence whose first state is reset has none.
        d_initial = [
            x.new_zeros(layout.sizes["B"], layout.sizes["H"]) if w else None for w in wanted[5]
        ]
        d_reset_to = [torch.zeros_like(states[0]) if w else None for w in wanted[7]]

        def given(gradients: Sequence[Tensor | None] | None) -> list[Tensor | None]:
            each = [None] * program.states if gradients is None else gradients
            return [None if d is None else d.to(x.dtype).contiguous() for d in each]

        given_by = Given(
            given(d_states),
            given(d_last),
            None if kappa is None else kappa.to(x.dtype).contiguous(),
            clip_grad or 0.0,
        )
        found, d_extras = self._run_backward(
            layout, states, kept, given_by, wanted, d_initial, d_reset_to
        )
        return Gradients(*found, d_initial, d_extras, d_reset_to)

    def _run_forward(
        self, layout: Layout, states: list[Tensor], last: list[Tensor], kept: Kept
    ) -> None:
        """Writes all of them."""
        raise NotImplementedError

    def _run_backward(
        self,
        layout: Layout,
        states: Sequence[Tensor],
        kept: Kept,
        given: Given,
        wanted: Gradients,
        d_initial: list[Tensor | None],
        d_reset_to: list[Tensor | None],
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The gradients of x, weights and biases, and those of the extras; writes the others."""
        raise NotImplementedError
