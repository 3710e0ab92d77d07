"""``vmap`` of a network's derivatives: what is mapped over becomes more sequences of one batch.

Sequence b of the v-th call is sequence b * V + v. Where the calls differ in the weights, or sums
over the batch would mix them, they are run one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fastbptt._points import Net

# What an argument or a result is, which says where its sequences are.
NONE = "none"  # no tensor
SIZES = "sizes"  # batch_sizes
ROWS = "rows"  # like input, with features or without
KEPT = "kept"  # [D, N, ...]
STATES = "states"  # [num_layers * directions, B, ...]
WEIGHT = "weight"

RESULTS = (ROWS, STATES, STATES)
BOUNDARIES = (SIZES, ROWS, ROWS)


def primals(net: Net) -> tuple[str, ...]:
    """Of input, hx, cx and the weights."""
    return (ROWS, STATES, STATES, *[WEIGHT] * net.num_weights)


def kept(net: Net) -> tuple[str, ...]:
    """Of the output, c and gates of all layers."""
    return (*[ROWS] * net.num_layers, *[KEPT] * (2 * net.num_layers))


@dataclass(frozen=True)
class Fold:
    """Puts V calls side by side in one batch, and takes them apart.

    ``steps`` is T of a padded input whose batch leads, whose rows of [D, N, ...] lie by sequence;
    1 for another.
    """

    V: int
    axis: int  # of the sequences in ROWS
    steps: int

    def _axis(self, kind: str) -> int:
        return self.axis if kind == ROWS else 1

    def together(self, kind: str, tensor: Tensor, dim: int | None) -> Tensor:
        """One tensor for V, which differ along ``dim``, or are one and the same."""
        if kind == SIZES:
            return tensor * self.V
        axis = self._axis(kind) + 1
        if dim is None:
            tensor = tensor.unsqueeze(0).expand(self.V, *tensor.shape)
        else:
            tensor = tensor.movedim(dim, 0)
        if kind == KEPT:
            tensor = tensor.unflatten(2, (tensor.shape[2] // self.steps, self.steps))
        tensor = tensor.movedim(0, axis)  # behind the sequences
        tensor = tensor.flatten(axis - 1, axis)
        return tensor.flatten(1, 2) if kind == KEPT else tensor

    def apart(self, kind: str, tensor: Tensor) -> Tensor:
        """The V tensors that are together in one, along a first dimension."""
        axis = self._axis(kind)
        if kind == KEPT:
            tensor = tensor.unflatten(1, (tensor.shape[1] // self.steps, self.steps))
        tensor = tensor.unflatten(axis, (tensor.shape[axis] // self.V, self.V))
        tensor = tensor.movedim(axis + 1, 0)
        return tensor.flatten(2, 3) if kind == KEPT else tensor


def fold_of(net: Net, V: int, input: Tensor, is_packed: bool) -> Fold:
    """For a network whose input this is, of one call or of all."""
    by_sequence = net.batch_first and not is_packed
    steps = input.shape[1] if by_sequence else 1
    return Fold(V, 0 if is_packed or net.batch_first else 1, max(steps, 1))


def map_over(
    function: Any,
    V: int,
    dims: Sequence[int | None],
    arguments: Sequence[Any],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """V calls of one of the derivatives' Functions, as a ``vmap`` staticmethod gives them.

    Args:
        function: the Function. Its arguments begin with a Net and batch_sizes; ``kinds`` and
            ``result_kinds`` say what they and the results are.
        V: how many calls.
        dims: the dimension of each argument along which the calls differ, or None.
        arguments: the Function's.
    """
    net = arguments[0]
    kinds, of_results = function.kinds(*arguments), function.result_kinds(*arguments)
    dims = [
        None if a is None or k == NONE else d
        for a, d, k in zip(arguments, dims, kinds, strict=True)
    ]
    is_mapped = [dim is not None for dim in dims]
    if any(m for m, kind in zip(is_mapped, kinds, strict=True) if kind == SIZES):
        raise ValueError("vmap cannot map over batch_sizes: every call must have the same lengths")
    own_weights = any(m for m, kind in zip(is_mapped, kinds, strict=True) if kind == WEIGHT)
    sums = WEIGHT in of_results
    if own_weights or (sums and not function.has_groups):
        return _one_by_one(function, V, dims, arguments)

    (point, *_) = function.read(*arguments)
    index = next(i for i, argument in enumerate(arguments) if argument is point.primals[0])
    input = point.primals[0]
    fold = fold_of(
        net,
        V,
        input.select(dims[index], 0) if is_mapped[index] else input,
        point.batch_sizes is not None,
    )
    folded = [
        argument if kind in (NONE, WEIGHT) or argument is None else fold.together(kind, argument, d)
        for kind, argument, d in zip(kinds, arguments, dims, strict=True)
    ]
    if sums:
        folded[0] = replace(net, groups=net.groups * V)
    results = function.apply(*folded)
    apart, where = [], []
    for kind, result in zip(of_results, results, strict=True):
        if kind == WEIGHT:
            had_groups = net.groups > 1
            shape = result.shape[had_groups or net.groups * V > 1 :]
            apart.append(result.reshape(*[net.groups] * had_groups, V, *shape))
            where.append(int(had_groups))
        else:
            apart.append(fold.apart(kind, result))
            where.append(0)
    return tuple(apart), tuple(where)


def _one_by_one(
    function: Any, V: int, dims: Sequence[int | None], arguments: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    calls = [
        function.apply(
            *(a if d is None else a.select(d, v) for a, d in zip(arguments, dims, strict=True))
        )
        for v in range(V)
    ]
    results = tuple(torch.stack(of_all) for of_all in zip(*calls, strict=True))
    return results, (0,) * len(results)


def _has_older_vmap(value: Any) -> bool:
    return isinstance(value, Tensor) and torch._C._functorch.is_legacy_batchedtensor(value)


def _older_level() -> int:
    """That of the innermost map. A device's thread of a backward pass does not know: one map."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return max(level, 1)


def _physical(arguments: Sequence[Any], level: int) -> tuple[list[Any], list[int | None]]:
    """What an older vmap maps over, with its dimension in front, and where there is one."""
    dims = [0 if _has_older_vmap(argument) else None for argument in arguments]
    physical = [
        # The size is for a tensor without that level.
        argument if dim is None else torch._remove_batch_dim(argument, level, 1, 0)
        for argument, dim in zip(arguments, dims, strict=True)
    ]
    return physical, dims


def apply_in_older_vmap(function: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """A call of one of the derivatives' Functions where torch.autograd's own vmap may map.

    ``is_grads_batched`` and its like map by an older vmap than torch.func's, which asks Functions
    for no rule.
    """
    if not any(map(_has_older_vmap, arguments)):
        return function.apply(*arguments)
    level = _older_level()
    physical, dims = _physical(arguments, level)
    sizes = (p.shape[0] for p, dim in zip(physical, dims, strict=True) if dim is not None)
    results, of_results = map_over(function, next(sizes), dims, physical)
    return tuple(
        torch._add_batch_dim(result, dim, level)
        for result, dim in zip(results, of_results, strict=True)
    )


def takes_older_vmap(method: Callable) -> Callable:
    """Lets a Function's ``backward`` or ``jvp`` take what that vmap maps over, by the newer one."""

    @wraps(method)
    def mapped(*arguments: Any) -> tuple[Any, ...]:
        if not any(map(_has_older_vmap, arguments)):
            return method(*arguments)
        level = _older_level()
        physical, dims = _physical(arguments, level)
        is_tensor: list[bool] = []

        def tensors_of(*varying: Tensor) -> tuple[Tensor, ...]:
            given = iter(varying)
            results = method(
                *(p if d is None else next(given) for p, d in zip(physical, dims, strict=True))
            )
            is_tensor[:] = (isinstance(result, Tensor) for result in results)
            return tuple(result for result in results if isinstance(result, Tensor))

        varying = (p for p, dim in zip(physical, dims, strict=True) if dim is not None)
        results = iter(torch.func.vmap(tensors_of)(*varying))
        return tuple(  # contiguous: that vmap's as_strided asks for it
            torch._add_batch_dim(next(results).contiguous(), 0, level) if there else None
            for there in is_tensor
        )

    return mapped
