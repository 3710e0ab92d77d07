"""What a cell's function is traced into: a short list of elementwise operations on numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["OPERATIONS", "Leaf", "Op", "Program", "Ref"]


class Leaf(NamedTuple):
    """An argument of the program: ("pre", gate), ("rec", gate), ("state", number), ("extra", name).

    As a tuple it is the key of :meth:`Program.evaluate`'s values.
    """

    kind: str
    key: int | str


@dataclass(frozen=True)
class Ref:
    """An earlier value: the leaves are numbered first, then the operations."""

    index: int


@dataclass(frozen=True)
class Op:
    """One operation on earlier values and constants; ``name`` is one of OPERATIONS."""

    name: str
    args: tuple[Ref | float, ...]


def _with(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For a torch function that takes no numbers: they become tensors like the others."""

    def computed(*args: Tensor | float) -> Tensor:
        like = next(arg for arg in args if isinstance(arg, Tensor))
        return compute(
            *(a if isinstance(a, Tensor) else torch.full((), a, dtype=like.dtype) for a in args)
        )

    return computed


# All that a kernel has to know. lt, le and eq give truth values, of which where takes the first
# of its arguments alone; everything else takes and gives numbers.
OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "neg": torch.neg,
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "abs": torch.abs,
    "maximum": _with(torch.maximum),
    "minimum": _with(torch.minimum),
    "where": torch.where,
    "lt": operator.lt,
    "le": operator.le,
    "eq": operator.eq,
}


@dataclass(frozen=True)
class Program:
    """A cell's step for one unit.

    Attributes:
        leaves: the gates' ``pre``, their ``rec``, the states, the other arguments; all of them,
            used or not, in this order.
        ops: in the order of evaluation; each is used, and none stands twice.
        results: the new states, each an earlier value or a constant.
    """

    leaves: tuple[Leaf, ...]
    ops: tuple[Op, ...]
    results: tuple[Ref | float, ...]

    def uses(self, kind: str) -> bool:
        """Whether a leaf of that kind has a part in the results."""
        used = {arg for op in self.ops for arg in op.args} | set(self.results)
        return any(Ref(i) in used for i, leaf in enumerate(self.leaves) if leaf.kind == kind)

    def evaluate(self, values: Mapping[tuple[str, int | str], Tensor]) -> list[Tensor | float]:
        """The new states as torch computes them from the leaves' tensors."""
        known: list[Tensor] = [values[leaf] for leaf in self.leaves]

        def given(args: Sequence[Ref | float]) -> list[Tensor | float]:
            return [known[arg.index] if isinstance(arg, Ref) else arg for arg in args]

        for op in self.ops:
            known.append(OPERATIONS[op.name](*given(op.args)))
        return given(self.results)

    def __str__(self) -> str:
        lines = [f"v{i} = {leaf.kind}[{leaf.key}]" for i, leaf in enumerate(self.leaves)]

        def text(arg: Ref | float) -> str:
            return f"v{arg.index}" if isinstance(arg, Ref) else repr(arg)

        for i, op in enumerate(self.ops, len(self.leaves)):
            lines.append(f"v{i} = {op.name}({', '.join(map(text, op.args))})")
        return "\n".join([*lines, f"return {', '.join(map(text, self.results))}"])
