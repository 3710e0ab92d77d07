"""Second derivatives where sums over the batch are kept apart by group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastbptt import _batching
from fastbptt._batching import RESULTS, ROWS, WEIGHT, fold_of
from fastbptt._points import OptionalTensors, Point


def by_group(
    second: Callable,
    point: Point,
    grads: OptionalTensors,
    grads_t: OptionalTensors,
    tangents: OptionalTensors,
    needs: Sequence[bool],
    own_tangents: bool,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """``second``, where the gradients of weights may be kept apart by group.

    second: gives the tangents of the results and of the gradients at a point without groups.
    own_tangents: each group has its own tangents of weights, and the results are summed; else the
    tangents are the same for all, and the results are kept apart.
    """
    net, groups = point.net, point.net.groups
    if groups == 1:
        return second(point, grads, grads_t, tangents, needs)
    fold = fold_of(net, groups, point.primals[0], point.batch_sizes is not None)
    primal_kinds = _batching.primals(net)

    def apart(kinds: Sequence[str], tensors: OptionalTensors) -> list[Any]:
        """For each group, the tensors that belong to it."""
        own = [
            [t] * groups if t is None or kind == WEIGHT else fold.apart(kind, t)
            for kind, t in zip(kinds, tensors, strict=True)
        ]
        return list(zip(*own, strict=True)) or [()] * groups

    boundaries = apart((ROWS,) * 2, point.boundaries[1:])
    primals, kept = apart(primal_kinds, point.primals), apart(_batching.kept(net), point.kept)
    masks = apart((ROWS,) * len(point.masks), point.masks)
    grads, grads_t = apart(RESULTS, grads), apart(RESULTS, grads_t)
    of_group = apart(primal_kinds, tangents)
    sizes = None if point.batch_sizes is None else point.batch_sizes // groups
    results = []
    for v in range(groups):
        at = Point(replace(net, groups=1), sizes, *boundaries[v], primals[v], kept[v], masks[v])
        along = of_group[v]
        if own_tangents:
            along = [*along[:3], *(None if w is None else w[v] for w in along[3:])]
        results.append(second(at, grads[v], grads_t[v], along, needs))

    def together(kinds: Sequence[str], of_groups: Sequence[OptionalTensors]) -> list[Tensor | None]:
        joined: list[Tensor | None] = []
        for kind, values in zip(kinds, zip(*of_groups, strict=True), strict=True):
            if values[0] is None:
                joined.append(None)
                continue
            stacked = torch.stack(values)  # type: ignore[arg-type]
            if kind == WEIGHT:
                joined.append(stacked.sum(0) if own_tangents else stacked)
            else:
                joined.append(fold.together(kind, stacked, 0))
        return joined

    of_results, of_primals = zip(*results, strict=True)
    return together(RESULTS, of_results), together(primal_kinds, of_primals)
