"""A cell's program in phases, between which there are means and deviations over all units.

A phase is what can be computed of a unit when all phases before it are known, of all units; a
program without normalization has one. What a later phase needs of an earlier one stands in slots, a
value of each unit; so do the values that are to be normalized. The derivative goes from the last
phase to the first, with slots of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from fastbptt._program import Argument, Op, Program, Ref


class Norm(NamedTuple):
    """Values that are normalized together, in phase ``phase``."""

    phase: int
    values: tuple[Argument, ...]
    eps: float
    outputs: tuple[int, ...]  # the numbers of the normalized values


def references(op: Op) -> list[int]:
    """The earlier values that an operation is of."""
    return [argument.index for argument in op.args if isinstance(argument, Ref)]


def completed(program: Program) -> Program:
    """The program with a normalized value for each that has a part in a mean and a deviation.

    The derivative reads all of them.
    """
    ops = list(program.ops)
    for op in program.ops:
        if op.name != "normalized":
            continue
        for k in range(len(op.args) - 2):
            other = Op("normalized", (float(k), *op.args[1:]))
            if other not in ops:
                ops.append(other)
    return Program(program.leaves, tuple(ops), program.results)


def norms_of(program: Program) -> tuple[Norm, ...]:
    """The normalizations of a completed program, in the order of their phases."""
    first, phases = len(program.leaves), program.phases
    found: dict[tuple, list[int]] = {}
    for i, op in enumerate(program.ops):
        if op.name == "normalized":
            found.setdefault(op.args[1:], []).append(first + i)
    norms = []
    for (*values, eps), outputs in found.items():
        outputs.sort(key=lambda index: program.ops[index - first].args[0])
        norms.append(Norm(phases[outputs[0]], tuple(values), float(eps), tuple(outputs)))
    return tuple(sorted(norms, key=lambda norm: (norm.phase, norm.outputs)))


@dataclass
class Slots:
    """What the forward pass hands from phase to phase.

    ``ends[p]`` of them are written by the end of phase p. Those of a normalization lie side by
    side, from ``of_norms`` on, and are written in the phase before it.
    """

    written: list[list[Argument]] = field(default_factory=list)  # in each phase
    of_norms: dict[int, int] = field(default_factory=dict)
    of_values: dict[int, int] = field(default_factory=dict)

    @property
    def ends(self) -> list[int]:
        ends, count = [], 0
        for values in self.written:
            count += len(values)
            ends.append(count)
        return ends


def slots_of(program: Program, norms: tuple[Norm, ...], live: Iterable[int]) -> Slots:
    """The slots of the forward pass, of which ``live`` are the values that are wanted."""
    first, phases = len(program.leaves), program.phases
    last = max(phases)
    lasting: dict[int, int] = {}  # in which phase a value is read last

    def read(argument: Argument, phase: int) -> None:
        if isinstance(argument, Ref):
            lasting[argument.index] = max(lasting.get(argument.index, 0), phase)

    for index in live:
        if index >= first and program.ops[index - first].name != "normalized":
            for argument in program.ops[index - first].args:
                read(argument, phases[index])
    for norm in norms:
        for value in norm.values:
            read(value, norm.phase - 1)
    for result in program.results:
        read(result, last)

    slots, count = Slots(), 0
    for phase in range(last + 1):
        written: list[Argument] = []
        for n, norm in enumerate(norms):
            if norm.phase - 1 != phase:
                continue
            slots.of_norms[n] = count + len(written)
            for value in norm.values:
                if isinstance(value, Ref) and phases[value.index] == phase:
                    slots.of_values.setdefault(value.index, count + len(written))
                written.append(value)
        for index, until in sorted(lasting.items()):
            is_in_memory = index < first and program.leaves[index].kind != "rec"
            if phases[index] == phase < until and not is_in_memory:
                if index not in slots.of_values:
                    slots.of_values[index] = count + len(written)
                    written.append(Ref(index))
        slots.written.append(written)
        count += len(written)
    return slots
