"""A cell's function as a list of operations, elementwise but for normalization over all units."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ref:
    """An earlier value of a program, by its number."""

    index: int


Argument = Ref | int | float | bool


class Leaf(NamedTuple):
    """What a program starts from: ``pre`` or ``rec`` of a gate, a state, or an extra argument.

    ``key`` is the number of the gate or state, or the argument's name; one with a value for each
    gate has as many leaves, ``name[0]`` and so on. All of a cell's are there, used or not, in this
    order.
    """

    kind: str
    key: int | str


@dataclass(frozen=True)
class Op:
    """An operation named as in torch, of earlier values and constants.

    All are elementwise but ``normalized``, of (k, v_0, ..., v_n, eps): v_k less the mean, divided
    by the deviation, of v_0 to v_n over all units of all of them; eps is added to the variance.
    Those that differ in k alone have mean and deviation in common, two numbers for each row.
    """

    name: str
    args: tuple[Argument, ...]


@dataclass(frozen=True)
class Program:
    """Operations whose values are numbered after the leaves; ``results`` are the new states."""

    leaves: tuple[Leaf, ...]
    ops: tuple[Op, ...]
    results: tuple[Argument, ...]

    @property
    def gates(self) -> int:
        """How many gates a unit has."""
        return sum(leaf.kind == "pre" for leaf in self.leaves)

    @property
    def states(self) -> int:
        """How many states a unit has."""
        return len(self.results)

    @property
    def extras(self) -> tuple[str, ...]:
        """The names of the arguments beside gates and states, in their order."""
        return tuple(str(leaf.key) for leaf in self.leaves if leaf.kind == "extra")

    def uses(self, kind: str) -> bool:
        """Whether a leaf of that kind has a part in the results."""
        used = {argument for op in self.ops for argument in op.args} | set(self.results)
        return any(Ref(i) in used for i, leaf in enumerate(self.leaves) if leaf.kind == kind)

    @property
    def phases(self) -> tuple[int, ...]:
        """For each value how many normalizations, one after another, come before it is known.

        Values of phase p are elementwise functions of one another, of earlier phases' and of the
        normalized ones of phase p, whose means and deviations are of earlier phases' values.
        """
        known = [0] * len(self.leaves)
        for op in self.ops:
            of_args = [known[arg.index] for arg in op.args if isinstance(arg, Ref)]
            known.append(max(of_args, default=0) + (op.name == "normalized"))
        return tuple(known)

    def __str__(self) -> str:
        def text(argument: Argument) -> str:
            return f"v{argument.index}" if isinstance(argument, Ref) else repr(argument)

        lines = [f"{leaf.kind}[{leaf.key}]" for leaf in self.leaves]
        lines += [f"{op.name}({', '.join(map(text, op.args))})" for op in self.ops]
        lines = [f"v{i} = {line}" for i, line in enumerate(lines)]
        return "\n".join([*lines, f"return {', '.join(map(text, self.results))}"])

    def evaluate(self, values: Mapping[Leaf, Tensor | float]) -> list[Tensor | float]:
        """The new states, given a tensor or number for each leaf."""
        known = [values[leaf] for leaf in self.leaves]

        def value(argument: Argument) -> Tensor | float:
            return known[argument.index] if isinstance(argument, Ref) else argument

        for op in self.ops:
            known.append(EVALUATE[op.name](*map(value, op.args)))
        return [value(result) for result in self.results]


def _as_tensors(function: Callable) -> Callable:
    """The function with numbers among its arguments made into tensors like the others."""

    def of_numbers_too(*args):
        like = next((x for x in args if isinstance(x, Tensor) and x.is_floating_point()), None)
        if like is None:
            like = torch.get_default_dtype()
        dtype, device = (like, None) if isinstance(like, torch.dtype) else (like.dtype, like.device)
        return function(
            *(
                x if isinstance(x, Tensor) else torch.tensor(x, dtype=dtype, device=device)
                for x in args
            )
        )

    return of_numbers_too


def normalize(values: Sequence[Tensor | float], eps: float) -> tuple[Tensor, ...]:
    """``values``, which broadcast to [..., H], normalized jointly over all units of all of them."""
    tensors = [x for x in values if isinstance(x, Tensor)]
    like = max(tensors, key=Tensor.dim) if tensors else torch.tensor(0.0)
    # Numbers, as tensors of no dimension too, may be on another device.
    each = (x if isinstance(x, Tensor) and x.dim() else torch.as_tensor(x).to(like) for x in values)
    wide = [x if x.dim() else x.reshape(1) for x in torch.broadcast_tensors(*each)]
    joint = wide[0] if len(wide) == 1 else torch.cat(wide, -1)
    return torch.nn.functional.layer_norm(joint, joint.shape[-1:], eps=eps).chunk(len(wide), -1)


EVALUATE: dict[str, Callable] = {
    "normalized": lambda k, *of: normalize(of[:-1], float(of[-1]))[int(k)],
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_not": torch.logical_not,
    "pow": _as_tensors(torch.pow),
    "maximum": _as_tensors(torch.maximum),
    "minimum": _as_tensors(torch.minimum),
    "where": lambda c, a, b: torch.where(c if isinstance(c, Tensor) else torch.tensor(c), a, b),
    **{
        name: _as_tensors(getattr(torch, name))
        for name in (
            "square reciprocal sqrt rsqrt exp expm1 log log1p tanh sigmoid relu erf sin cos abs "
            "sign"
        ).split()
    },
    "clamp": lambda a, low, high: torch.clamp(
        a, None if low == -math.inf else low, None if high == math.inf else high
    ),
}
