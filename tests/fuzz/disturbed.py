"""Arguments of operators, laid out otherwise or made wrong."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fuzz.guarded import guarded

INTEGERS = (-(2**63), -(2**62), -(2**31), -2, -1, 0, 1, 2, 3, 5, 2**31, 2**32 + 1, 2**62, 2**63 - 1)
FLOATS = (0.0, 1.0, -1.0, 0.5, 1e-310, 1e300, float("nan"), float("inf"), -float("inf"))
STRINGS = ("tanh", "relu", "identity", "gru", "lstm", "", "GRU", "lstm\0", "é" * 100)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)
OTHER_DTYPES = (torch.complex64, torch.uint8, torch.float8_e4m3fn)


def laid_out(tensor: Tensor, choose: random.Random) -> Tensor:
    """The same values with other strides, some of which no allocation gives."""
    how = choose.choice(["as it is", "with gaps", "turned", "behind others", "odd strides of one"])
    if tensor.numel() == 0 or how == "as it is":
        return tensor
    if how == "with gaps":
        wide = tensor.new_zeros(*tensor.shape, 2)
        wide[..., 0] = tensor
        return wide[..., 0]
    if how == "turned" and tensor.dim() > 1:
        order = list(range(tensor.dim()))
        choose.shuffle(order)
        back = [order.index(i) for i in range(len(order))]
        return tensor.permute(order).contiguous().permute(back)
    if how == "behind others":
        flat = torch.cat([tensor.new_zeros(3), tensor.reshape(-1)])
        return flat[3:].view(tensor.shape)
    strides = [7 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(tensor.shape, strides)


def overlapping(tensor: Tensor, choose: random.Random) -> Tensor:
    """Of the same shape, whose elements share memory."""
    if tensor.numel() < 2:
        return tensor
    if choose.random() < 0.5:
        axis = choose.randrange(tensor.dim())
        return tensor.narrow(axis, 0, 1).expand(tensor.shape)
    strides = [choose.choice([0, 1, 1]) for _ in tensor.shape]
    return tensor.as_strided(tensor.shape, strides)


def wrong_tensor(tensor: Tensor, choose: random.Random) -> object:
    """Something else in a tensor's place."""
    shape = list(tensor.shape)
    axis = choose.randrange(len(shape)) if shape else None
    how = choose.randrange(12)
    if how == 0 and axis is not None:  # a size off
        shape[axis] = max(0, shape[axis] + choose.choice([-1, 1, 2]))
        return torch.ones(shape).to(tensor.dtype)
    if how == 1:
        return tensor.to(choose.choice(DTYPES))
    if how == 2 and axis is not None:
        return tensor.unsqueeze(axis) if choose.random() < 0.5 else tensor.select(axis, 0) if (
            shape[axis] > 0
        ) else tensor  # fmt: skip
    if how == 3:
        return None
    if how == 4:
        return tensor.new_empty(0)
    if how == 5 and tensor.numel() and tensor.dtype.is_floating_point:
        changed = tensor.clone()
        # Through a tensor: 1e300 becomes infinite, where a number would be refused.
        value = torch.tensor(choose.choice(FLOATS), dtype=torch.float64).to(changed.dtype)
        changed.view(-1)[choose.randrange(changed.numel())] = value
        return changed
    if how == 6:
        return tensor.to("meta")
    if how == 7:
        return choose.choice([tensor.to_sparse, lambda: tensor.to(choose.choice(OTHER_DTYPES))])()
    if how == 8 and axis is not None:  # beyond all memory, of strides 0
        shape[axis] = 2**40
        return tensor.new_ones(()).expand(shape)
    if how == 9 and tensor.dtype == torch.int64 and tensor.numel():
        changed = tensor.clone()
        changed.view(-1)[choose.randrange(changed.numel())] = choose.choice(INTEGERS)
        return changed
    if how == 10 and tensor.dtype.is_floating_point:
        return torch._neg_view(tensor)
    if how == 11:
        return choose.choice([torch.zeros(()), torch.ones(2, 3, 4, 5), "tensor", 3, [tensor]])
    return overlapping(tensor, choose)


def wrong_value(value: object, choose: random.Random) -> object:
    if isinstance(value, Tensor):
        return wrong_tensor(value, choose)
    if isinstance(value, bool):
        return choose.choice([not value, not value, 2, None])
    if isinstance(value, int):
        return choose.choice([*INTEGERS, value + 1, value - 1, 0.5, 2**64, None])
    if isinstance(value, float):
        return choose.choice([*FLOATS, None])
    if isinstance(value, str):
        return choose.choice([*STRINGS, None])
    if isinstance(value, list | tuple) and value:
        items = list(value)
        at = choose.randrange(len(items))
        how = choose.randrange(4)
        if how == 0:
            del items[at]
        elif how == 1:
            items.insert(at, items[at])
        elif how == 2:
            items[at] = wrong_value(items[at], choose)
        else:
            items = []
        return items
    return choose.choice([value, None, torch.ones(3), torch.tensor([2, 1]), 1])


class Disturbed:
    """Arguments with other layouts, and some that are wrong; a plain copy of them besides."""

    def __init__(
        self,
        arguments: dict[str | int, object],
        fixed: set[str | int],
        choose: random.Random,
        writable: bool,
    ) -> None:
        plain = dict(arguments)
        self.changed: list[str | int] = []
        if choose.random() < 0.6:
            free = [key for key in plain if key not in fixed]
            self.changed = choose.sample(free, min(len(free), choose.choice([1, 1, 1, 2, 3])))
            for key in self.changed:
                plain[key] = wrong_value(plain[key], choose)
        aliases: dict[tuple, Tensor] = {}
        is_aliased = choose.random() < 0.2

        def lay_out(value: object) -> object:
            if not _is_plain(value):
                return value
            if is_aliased:  # arguments of one shape and dtype are one tensor
                value = aliases.setdefault((value.shape, value.dtype), value)
                return value
            return laid_out(value, choose)

        values, form = tree_flatten(plain)
        given = [lay_out(value) for value in values]
        self.values = [v.clone(memory_format=torch.contiguous_format) if _is_plain(v) else v
                       for v in given]  # fmt: skip
        at_end = choose.random() < 0.7
        kept: dict[int, Tensor] = {}

        def guard(value: object) -> object:
            if not _is_plain(value):
                return value
            return kept.setdefault(id(value), guarded(value, at_end, writable))

        self.given = tree_unflatten([guard(value) for value in given], form)
        self.plain = tree_unflatten(self.values, form)

    def tensors(self) -> list[Tensor]:
        return [value for value in self.values if isinstance(value, Tensor)]

    def is_moderate(self) -> bool:
        """Whether results are numbers that rounding changes little."""
        return all(
            _is_plain(t) and (not t.is_floating_point() or bool((t.double().abs() < 30).all()))
            for t in self.tensors()
        )


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and value.numel() < 10**6
        and not value.is_neg()
    )


def widened(arguments: object) -> object:
    """Floating numbers as float64."""
    return tree_map(
        lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, arguments
    )
