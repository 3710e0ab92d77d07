"""A program's operations as C++, in terms of the kernels' value type."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fastbptt._phases import Norm, Slots
from fastbptt._program import Argument, Op, Program, Ref
from fastbptt._rules import COMPARISONS, CONSTANT_ARGUMENTS, FLAG_ARGUMENTS, FORWARD


def literal(x: float) -> str:
    """A number as C++ reads it back, bit by bit."""
    x = float(x)
    if math.isnan(x):
        return "not_a_number()"
    if math.isinf(x):
        return "infinity()" if x > 0 else "-infinity()"
    return x.hex()


@dataclass
class Writer:
    program: Program
    lines: list[str] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)

    def op(self, index: int) -> Op | None:
        first = len(self.program.leaves)
        return self.program.ops[index - first] if index >= first else None

    def is_flag(self, index: int) -> bool:
        op = self.op(index)
        return op is not None and op.name in COMPARISONS

    def argument(self, argument: Argument, as_flag: bool = False) -> str:
        """An argument as a value, or as what a comparison gives."""
        if not isinstance(argument, Ref):
            if as_flag:
                return f"(V{{}} {'==' if argument else '!='} V{{}})"
            return f"number<V>({literal(argument)})"
        name = f"v{argument.index}"
        if as_flag == self.is_flag(argument.index):
            return name
        return f"({name} != 0)" if as_flag else f"select({name}, number<V>(1), V{{}})"

    def arguments(self, op: Op) -> list[str]:
        flags = FLAG_ARGUMENTS.get(op.name, ())
        constants = CONSTANT_ARGUMENTS.get(op.name, ())
        return [
            literal(argument) if i in constants else self.argument(argument, i in flags)
            for i, argument in enumerate(op.args)
        ]

    def compute(self, index: int, norms: tuple[Norm, ...] = (), slots: Slots | None = None) -> None:
        """A value of its arguments; a normalized one in the forward pass of what a slot holds."""
        op = self.op(index)
        if op.name == "normalized":
            n = next(n for n, norm in enumerate(norms) if index in norm.outputs)
            k = norms[n].outputs.index(index)
            value = self.argument(norms[n].values[k])
            if slots is not None:
                value = f"slots[{slots.of_norms[n] + k}]"
            expression = f"({value} - mean[{n}]) * scale[{n}]"
        else:
            expression = FORWARD[op.name].format(*self.arguments(op))
        kind = "auto" if op.name in COMPARISONS else "V"
        self.lines.append(f"const {kind} v{index} = {expression};")


def leaf_expressions(program: Program) -> list[str]:
    """Where the generated functions find each leaf."""
    extras = program.extras
    arrays = {"pre": "pre", "rec": "rec", "state": "before", "extra": "extra"}
    return [
        f"{arrays[leaf.kind]}[{extras.index(leaf.key) if leaf.kind == 'extra' else leaf.key}]"
        for leaf in program.leaves
    ]
