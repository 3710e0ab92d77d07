"""Windows of a truncation, for passes that know no windows but such as lie side by side.

Where windows overlap, each window of each sequence is made a sequence of its own, of a packed
batch: it begins with the states that the forward pass kept, which are constants. What the windows
give is put together again: a step's tangent is that of the window that has its loss, and gradients
add up.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastbptt._points import OptionalTensors, Point, without_windows


def _lengths(point: Point) -> Tensor:
    """The steps of each sequence, [B] on the CPU."""
    sizes = point.batch_sizes
    if sizes is None:
        B, T = point.primals[0].shape[:2]
        if not point.net.batch_first:
            B, T = T, B
        return torch.full((B,), T, device="cpu")
    return (sizes[:, None] > torch.arange(point.num_sequences(), device="cpu")).sum(0)


def _row(point: Point, t: Tensor, b: Tensor) -> Tensor:
    """Where step t of sequence b is, among the rows of input."""
    sizes = point.batch_sizes
    if sizes is not None:
        return (sizes.cumsum(0) - sizes)[t] + b
    width, other = point.primals[0].shape[1], (b, t)
    return t * width + b if not point.net.batch_first else other[0] * width + other[1]


class LastLosses:
    """Only the last loss of each window counts; windows lie side by side."""

    def __init__(self, point: Point):
        input = point.primals[0]
        rows = input.shape[:-1]
        with _disable_current_modes():  # to a tracer they are constants
            lengths = _lengths(point)
            steps = torch.arange(int(lengths.max()) if len(lengths) else 0, device="cpu")[:, None]
            there = steps < lengths
            k1 = point.net.k1
            t, b = there.nonzero(as_tuple=True)
            ends = (t % k1 == k1 - 1) | (t == lengths[b] - 1)
            counts = torch.zeros(rows.numel(), dtype=torch.bool, device="cpu")
            counts[_row(point, t, b)] = ends
        self.ignored = ~counts.view(*rows, 1).to(input.device)
        self.point = without_windows(point)

    def grads(self, grads: OptionalTensors) -> list[Tensor | None]:
        """Those of the results, as the passes are to have them."""
        return [self._counting(grads[0]), *grads[1:]]

    def tangents(self, tangents: OptionalTensors) -> list[Tensor | None]:
        """Those of the primals, likewise."""
        return list(tangents)

    def results(self, results: OptionalTensors) -> list[Tensor | None]:
        """What the passes gave for output, h_n and c_n, as the caller is to have it."""
        return [self._counting(results[0]), *results[1:]]

    def sums(self, of_primals: OptionalTensors) -> list[Tensor | None]:
        """What they gave for the primals."""
        return list(of_primals)

    def _counting(self, output: Tensor | None) -> Tensor | None:
        return None if output is None else output.masked_fill(self.ignored, 0)


class Overlapping:
    """Windows that overlap, of a network in one direction. Methods as those of LastLosses."""

    def __init__(self, point: Point):
        net, (input, hx, cx, *weights) = point.net, point.primals
        self.original = point
        with _disable_current_modes():  # to a tracer they are constants
            lengths = _lengths(point)
            T, B = int(lengths.max()) if len(lengths) else 0, len(lengths)
            # The windows, in the order of their place, those of one place in the order of the
            # batch: where the sequences of a group repeat alike, so do the windows.
            first_loss = torch.arange(0, T, min(net.k1, max(T, 1)), device="cpu")
            window, b = (first_loss[:, None] < lengths).nonzero(as_tuple=True)
            first = first_loss[window]
            begin = (first - min(net.k2 - net.k1, T)).clamp(min=0)
            end = torch.minimum(first + min(net.k1, T), lengths[b])
            order = torch.argsort(end - begin, descending=True, stable=True)
            first, b, begin, end = (each[order] for each in (first, b, begin, end))
            steps = end - begin
            longest = int(steps[0]) if len(steps) else 0
            step, of_window = (torch.arange(longest, device="cpu")[:, None] < steps).nonzero(
                as_tuple=True
            )
            t = begin[of_window] + step
            has_loss = t == end[of_window] - 1 if net.last_only else t >= first[of_window]
            is_last = end == lengths[b]
            rows = _row(point, t, b[of_window])
            loss_row = torch.full((input.shape[:-1].numel(),), len(rows), device="cpu")
            loss_row[rows[has_loss]] = has_loss.nonzero().squeeze(1)
            last_window = torch.empty(B, dtype=torch.int64, device="cpu")
            last_window[b[is_last]] = is_last.nonzero().squeeze(1)
            before = _row(point, (begin - 1).clamp(min=0), b)
            batch_sizes = (torch.arange(longest, device="cpu")[:, None] < steps).sum(1)

        device = input.device
        self.rows = rows.to(device)  # of the original, for each row here
        self.ignored = ~has_loss[:, None].to(device)
        # The row here of each loss; one row more, of zeros, for steps that have none.
        self.loss_row = loss_row.to(device)
        self.sequence = b.to(device)
        self.starts = (begin == 0)[None, :, None].to(device)
        self.last_window = last_window.to(device)
        self.is_last = is_last[None, :, None].to(device)
        before = before.to(device)

        def entering(given: Tensor | None, kept: list[Tensor]) -> Tensor:
            entered = torch.stack([each.detach().index_select(0, before) for each in kept])
            initial = (
                torch.zeros_like(entered) if given is None else given.index_select(1, self.sequence)
            )
            return torch.where(self.starts, initial, entered)

        L = net.num_layers
        outputs, c = [self._flat(x) for x in point.kept[:L]], point.kept[L : 2 * L]
        states = [entering(hx, outputs), None]
        if net.cell == "lstm":
            states[1] = entering(cx, [each[0] for each in c])
        kept = (
            *(x.index_select(0, self.rows) for x in outputs),
            *(x.index_select(1, self.rows) for x in point.kept[L:]),
        )
        packed = replace(without_windows(point).net, k1=0, k2=0, batch_first=False)
        self.point = Point(
            packed,
            batch_sizes,
            *(None if x is None else x.flatten()[self.rows] for x in (point.resets, point.kappa)),
            (self._expanded(input), *states, *weights),
            kept,
            tuple(self._expanded(mask) for mask in point.masks),
        )

    @staticmethod
    def _flat(rows: Tensor) -> Tensor:
        return rows.reshape(-1, rows.shape[-1])

    def _expanded(self, rows: Tensor | None) -> Tensor | None:
        return None if rows is None else self._flat(rows).index_select(0, self.rows)

    def _folded(self, rows: Tensor, index: Tensor) -> Tensor:
        """Rows here, as the original has them; beyond the last there are zeros."""
        shape = self.original.primals[0].shape[:-1]
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[-1])])
        return rows.index_select(0, index).reshape(*shape, rows.shape[-1])

    def grads(self, grads: OptionalTensors) -> list[Tensor | None]:
        of_output, *of_states = grads
        if of_output is not None:
            of_output = self._expanded(of_output).masked_fill(self.ignored, 0)
        return [of_output, *(self._of_windows(state, self.is_last) for state in of_states)]

    def tangents(self, tangents: OptionalTensors) -> list[Tensor | None]:
        input, hx, cx, *weights = tangents
        states = (self._of_windows(state, self.starts) for state in (hx, cx))
        return [self._expanded(input), *states, *weights]

    def _of_windows(self, states: Tensor | None, those: Tensor) -> Tensor | None:
        """Each window's, from its sequence's; zeros for other windows than those."""
        if states is None:
            return None
        return states.index_select(1, self.sequence).masked_fill(~those, 0)

    def results(self, results: OptionalTensors) -> list[Tensor | None]:
        output, *states = results
        if output is not None:
            output = self._folded(output, self.loss_row)
        ends = (None if s is None else s.index_select(1, self.last_window) for s in states)
        return [output, *ends]

    def sums(self, of_primals: OptionalTensors) -> list[Tensor | None]:
        input, hx, cx, *weights = of_primals
        if input is not None:
            shape = self.original.primals[0].shape
            zeros = input.new_zeros(shape[:-1].numel(), shape[-1])
            input = zeros.index_add(0, self.rows, input).reshape(shape)
        return [input, self._sum(hx), self._sum(cx), *weights]

    def _sum(self, states: Tensor | None) -> Tensor | None:
        if states is None:
            return None
        shape = (states.shape[0], len(self.last_window), states.shape[2])
        ours = states.masked_fill(~self.starts, 0)
        return states.new_zeros(shape).index_add(1, self.sequence, ours)


class SideBySide:
    """Windows that do not overlap, or none: the passes cut them. Methods as LastLosses'."""

    def __init__(self, point: Point):
        self.point = without_windows(point)

    def grads(self, grads: OptionalTensors) -> list[Tensor | None]:
        return list(grads)

    tangents = results = sums = grads


Windows = SideBySide | LastLosses | Overlapping


def windows_of(point: Point) -> Windows:
    """What makes of a point one whose windows lie side by side, and whose every loss counts."""
    if point.net.overlaps:
        return Overlapping(point)
    return LastLosses(point) if point.net.last_only else SideBySide(point)
