"""The derivative of a cell's program as C++, in reverse, phase by phase.

Of the values that it reads, those which are dear to compute are kept by the forward pass; the rest
is computed again from what is in memory anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fastbptt._cpp import Writer, leaf_expressions, literal
from fastbptt._phases import Norm, references
from fastbptt._program import Argument, Op, Program, Ref
from fastbptt._rules import COMPARISONS, DEAR, DERIVATIVE


def _derivatives(op: Op) -> tuple[str | None, ...]:
    if op.name != "pow":
        return DERIVATIVE.get(op.name, ())
    exponent = float(op.args[1])
    power = f"power_of({{0}}, {literal(exponent - 1)})"
    return (f"{{g}} * number<V>({literal(exponent)}) * {power}",)


@dataclass
class Stage:
    """The derivative of one phase: its statements, and the names of the leaves' gradients."""

    lines: list[str]
    names: dict[int, str]
    read: set[int]  # values
    slots_end: int


def _final_stages(program: Program, norms: tuple[Norm, ...]) -> dict[int, int]:
    """In which stage the gradient of each value has its last share; of those that have one."""
    writer, phases, first = Writer(program), program.phases, len(program.leaves)
    last = {
        result.index: max(phases)
        for result in program.results
        if isinstance(result, Ref) and not writer.is_flag(result.index)
    }
    for index in reversed(range(first, first + len(program.ops))):
        if index not in last:
            continue
        op, stage = writer.op(index), phases[index]
        given = zip(op.args, _derivatives(op), strict=False)
        reached = [argument for argument, derivative in given if derivative is not None]
        if op.name == "normalized":
            stage, reached = stage - 1, op.args[1:-1]
        for argument in reached:
            if isinstance(argument, Ref) and not writer.is_flag(argument.index):
                last[argument.index] = min(stage, last.get(argument.index, stage))
    return last


def stages_of(program: Program, norms: tuple[Norm, ...]) -> list[Stage]:
    """The derivative, by phase; it goes from the last one to the first."""
    writer, first, phases = Writer(program), len(program.leaves), program.phases
    final = _final_stages(program, norms)
    shares: dict[int, list[str]] = {}
    for k, result in enumerate(program.results):
        if isinstance(result, Ref) and not writer.is_flag(result.index):
            shares.setdefault(result.index, []).append(f"d_after[{k}]")
    stages: list[Stage] = []
    slots = 0

    def add(argument: Argument, share: str) -> None:
        if isinstance(argument, Ref) and not writer.is_flag(argument.index):
            shares.setdefault(argument.index, []).append(share)

    for phase in reversed(range(max(phases) + 1)):
        lines, names, read = [], {}, set()
        for n, norm in enumerate(norms):
            if norm.phase != phase + 1 or not final.keys() & set(norm.outputs):
                continue
            for value, output in zip(norm.values, norm.outputs, strict=True):
                read.add(output)
                (own,) = shares.pop(output, ["V{}"])
                centred = f"{own} - d_mean[{n}] - v{output} * d_scale[{n}]"
                add(value, f"(scale[{n}] * ({centred}))")
        for index in reversed(range(first + len(program.ops))):
            if index not in shares or (phases[index] if index >= first else final[index]) != phase:
                continue
            parts = shares.pop(index)
            name = parts[0]
            if len(parts) > 1 or not name.startswith("d"):
                name = f"d{index}"
                lines.append(f"const V {name} = {' + '.join(parts)};")
            op = writer.op(index)
            if op is None:
                names[index] = name
            elif op.name == "normalized":
                shares[index] = [name]
            else:
                arguments = writer.arguments(op)
                for argument, derivative in zip(op.args, _derivatives(op), strict=False):
                    if derivative is None or not isinstance(argument, Ref):
                        continue
                    if writer.is_flag(argument.index):
                        continue
                    share = derivative.format(*arguments, g=name, y=f"v{index}")
                    if "{y}" in derivative:
                        read.add(index)
                    for j, other in enumerate(op.args):
                        if isinstance(other, Ref) and f"{{{j}}}" in derivative:
                            read.add(other.index)
                    add(argument, share if share == name else f"({share})")
        for n, norm in enumerate(norms):
            if norm.phase != phase:
                continue
            given = [(shares[i][0], f"v{i}") for i in norm.outputs if i in shares]
            read |= {i for i in norm.outputs if i in shares}
            sums = [[d for d, _ in given], [f"{d} * {x}" for d, x in given]]
            for i, terms in enumerate(sums):
                lines.append(f"sums[{2 * n + i}] = {' + '.join(terms) or 'V{}'};")
        for index, parts in shares.items():
            if len(parts) > 1 or not parts[0].startswith("d_slots["):
                lines.append(f"d_slots[{slots}] = {' + '.join(parts)};")
                shares[index] = [f"d_slots[{slots}]"]
                slots += 1
        stages.append(Stage(lines, names, read, slots))
    return stages[::-1]


@dataclass
class Sources:
    """Where a derivative finds values: those that are kept, those in memory, else it computes."""

    program: Program
    norms: tuple[Norm, ...]
    recomputed: frozenset[int] = frozenset()
    kept: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.writer, self.leaves = Writer(self.program), leaf_expressions(self.program)
        results = enumerate(self.program.results)
        self.after = {r.index: k for k, r in results if isinstance(r, Ref)}

    def is_after(self, index: int) -> bool:
        return index in self.after and not self.writer.is_flag(index)

    def must_keep(self, index: int) -> bool:
        op = self.writer.op(index)
        if op is None:
            return self.program.leaves[index].kind == "rec"
        if self.is_after(index) or index in self.recomputed:
            return False
        if op.name == "normalized":
            value = op.args[1 + int(op.args[0])]
            return isinstance(value, Ref) and not self.is_in_memory(value.index)
        return op.name in DEAR or self.sums_gates(op)

    def is_in_memory(self, index: int) -> bool:
        is_leaf = index < len(self.leaves) and self.program.leaves[index].kind != "rec"
        return is_leaf or self.is_after(index)

    def sums_gates(self, op: Op) -> bool:
        """Whether an operation reads what W_hh gives a gate, which is nowhere in memory."""
        gates = (i for i in references(op) if i < len(self.program.leaves))
        is_sum = op.name not in COMPARISONS and op.name != "normalized"
        return is_sum and any(self.program.leaves[i].kind == "rec" for i in gates)

    def order(self, read: set[int]) -> list[int]:
        """What must be found for some values to be known, in the order of the program."""
        found, waiting = set(), set(read)
        while waiting:
            index = waiting.pop()
            found.add(index)
            op = self.writer.op(index)
            if op is None or self.must_keep(index) or self.is_after(index):
                continue
            needed = references(op)
            if op.name == "normalized":
                value = op.args[1 + int(op.args[0])]
                needed = [value.index] if isinstance(value, Ref) else []
            waiting |= set(needed) - found
        return sorted(found)

    def lines(self, read: set[int]) -> list[str]:
        """The statements that find some values."""
        writer = self.writer
        writer.lines = []
        for index in self.order(read):
            if index in self.kept:
                writer.lines.append(f"const V v{index} = kept[{self.kept.index(index)}];")
            elif writer.op(index) is None:
                writer.lines.append(f"const V v{index} = {self.leaves[index]};")
            elif self.is_after(index):
                writer.lines.append(f"const V v{index} = after[{self.after[index]}];")
            else:
                writer.compute(index, self.norms)
        return writer.lines


def sources_of(program: Program, norms: tuple[Norm, ...], read: set[int]) -> Sources:
    """Where the derivative finds the values that it reads.

    Where those that must be kept are more than the gates, whose memory they could take, functions
    of what is in memory anyway are computed again too.
    """

    def sources(recomputed: frozenset[int] = frozenset()) -> Sources:
        found = Sources(program, norms, recomputed)
        found.kept = [i for i in found.order(read) if found.must_keep(i)]
        found.kept.sort(key=lambda i: (program.phases[i], i))
        return found

    found = sources()
    first = len(program.leaves)
    known = {i for i in range(first) if program.leaves[i].kind in ("state", "extra")}
    known |= {result.index for result in program.results if isinstance(result, Ref)}
    again = [
        i for i in found.kept if i >= first and known.issuperset(references(program.ops[i - first]))
    ]
    excess = len(found.kept) - program.gates
    if not norms and 0 < excess <= len(again):
        return sources(frozenset(again[-excess:]))
    return found
