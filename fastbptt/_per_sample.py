"""The gradients of weights that each sequence of a batch gives, by one backward pass.

The operator that keeps sums over the batch apart does so where at each step all groups have as many
sequences. In a packed batch those of one length do: each length has a pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbptt import _batching
from fastbptt._derivatives import _gradients
from fastbptt._points import OptionalTensors, Point


def by_sequence(point: Point, grads: OptionalTensors, needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of the primals, those of weights by sequence: [B, *shape].

    Args:
        point: where; of a packed batch too.
        grads: of output, h_n and c_n.
        needs: whose gradients: input's, hx', cx' and each weight's.
    """
    if point.batch_sizes is None:
        return _of_equal_lengths(point, grads, needs)
    input = point.primals[0]
    of_parts, rows_of_parts = [], []
    for rows, sequences in _lengths(point.batch_sizes):
        rows = rows.to(input.device)
        part, of_results = _part(point, grads, rows, sequences)
        of_parts.append(_of_equal_lengths(part, of_results, needs))
        rows_of_parts.append(rows.flatten())
    kinds = _batching.primals(point.net)
    gradients: list[Tensor | None] = []
    for kind, parts in zip(kinds, zip(*of_parts, strict=True), strict=True):
        if parts[0] is None:
            gradients.append(None)
        elif kind == _batching.ROWS:
            parts = torch.cat([part.flatten(0, 1) for part in parts])
            order = torch.cat(rows_of_parts).argsort()
            gradients.append(parts.index_select(0, order))
        else:
            gradients.append(torch.cat(parts, 1 if kind == _batching.STATES else 0))
    return gradients


def _of_equal_lengths(
    point: Point, grads: OptionalTensors, needs: Sequence[bool]
) -> list[Tensor | None]:
    B = point.num_sequences()
    apart = point._replace(net=point.net.but(groups=max(B, 1)))
    gradients = _gradients(apart, grads, needs)
    if B > 1:
        return gradients
    return [*gradients[:3], *(None if w is None else w[None][:B] for w in gradients[3:])]


def _lengths(batch_sizes: Tensor) -> list[tuple[Tensor, slice]]:
    """For each length: the rows [length, sequences] of a packed batch, and which sequences."""
    sizes = batch_sizes.tolist()
    starts = (batch_sizes.cumsum(0) - batch_sizes)[:, None]
    parts = []
    for length, (size, following) in enumerate(zip(sizes, [*sizes[1:], 0], strict=True), 1):
        if following < size:
            rows = starts[:length] + torch.arange(following, size, device="cpu")
            parts.append((rows, slice(following, size)))
    return parts[::-1]  # the longest come first in the batch


def _part(
    point: Point, grads: OptionalTensors, rows: Tensor, sequences: slice
) -> tuple[Point, list[Any]]:
    """Some sequences of one length, as a batch that is not packed; and their results' gradients."""

    def taken(kinds: Sequence[str], tensors: OptionalTensors) -> list[Any]:
        return [_taken(k, t, rows, sequences) for k, t in zip(kinds, tensors, strict=True)]

    net = point.net
    part = Point(
        net.but(batch_first=False),
        None,
        *taken((_batching.ROWS,) * 2, point.boundaries[1:]),
        tuple(taken(_batching.primals(net), point.primals)),
        tuple(taken(_batching.kept(net), point.kept)),
        tuple(taken((_batching.ROWS,) * len(point.masks), point.masks)),
    )
    return part, taken(_batching.RESULTS, grads)


def _taken(kind: str, tensor: Tensor | None, rows: Tensor, sequences: slice) -> Tensor | None:
    if tensor is None or kind == _batching.WEIGHT:
        return tensor
    if kind == _batching.ROWS:
        return tensor.index_select(0, rows.flatten()).unflatten(0, rows.shape)
    if kind == _batching.STATES:
        return tensor[:, sequences]
    return tensor.index_select(1, rows.flatten()) if tensor.shape[1] else tensor  # c or gates
