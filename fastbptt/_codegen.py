"""A cell's program as C++, in terms of the kernels' value type: forward, and its derivative.

The derivative is the program's, in reverse. Of the values that it reads, those which are dear to
compute are kept by the forward pass; the rest is computed again from what is in memory anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fastbptt._program import Argument, Op, Program, Ref
from fastbptt._rules import (
    COMPARISONS,
    CONSTANT_ARGUMENTS,
    DEAR,
    DERIVATIVE,
    FLAG_ARGUMENTS,
    FORWARD,
)

#: Bytes of a vector and what vec.h and the compiler must be told, by instruction set.
INSTRUCTION_SETS = {
    "avx512": (
        64,
        "FASTBPTT_AVX512",
        ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
    ),
    "avx2": (32, "FASTBPTT_F16C", ("-mavx2", "-mfma", "-mf16c")),
    "baseline": (16, None, ()),
}

SCALARS = {torch.float32: "float", torch.float64: "double"}


def literal(x: float) -> str:
    """A number as C++ reads it back, bit by bit."""
    x = float(x)
    if math.isnan(x):
        return '__builtin_nan("")'
    if math.isinf(x):
        return "__builtin_inf()" if x > 0 else "-__builtin_inf()"
    return x.hex()


@dataclass
class _Writer:
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

    def compute(self, index: int) -> None:
        op = self.op(index)
        expression = FORWARD[op.name].format(*self.arguments(op))
        kind = "auto" if op.name in COMPARISONS else "V"
        self.lines.append(f"const {kind} v{index} = {expression};")


def _references(op: Op) -> list[int]:
    return [argument.index for argument in op.args if isinstance(argument, Ref)]


def _leaf_expressions(program: Program) -> list[str]:
    """Where the generated functions find each leaf."""
    extras = program.extras
    arrays = {"pre": "pre", "rec": "rec", "state": "before", "extra": "extra"}
    return [
        f"{arrays[leaf.kind]}[{extras.index(leaf.key) if leaf.kind == 'extra' else leaf.key}]"
        for leaf in program.leaves
    ]


def _live(program: Program, roots: set[int]) -> list[int]:
    """The values that some others are made of, in their order."""
    first = len(program.leaves)
    live, waiting = set(), set(roots)
    while waiting:
        index = waiting.pop()
        if index in live:
            continue
        live.add(index)
        if index >= first:
            waiting.update(_references(program.ops[index - first]))
    return sorted(live)


def _pow_derivative(op: Op) -> str:
    exponent = float(op.args[1])
    return f"{{g}} * number<V>({literal(exponent)}) * power_of({{0}}, {literal(exponent - 1)})"


def _gradients(program: Program) -> tuple[list[str], dict[int, str], set[int]]:
    """The statements of the derivative, the name of each leaf's gradient, and what they read."""
    writer, first = _Writer(program), len(program.leaves)
    shares: dict[int, list[str]] = {}
    for k, result in enumerate(program.results):
        if isinstance(result, Ref) and not writer.is_flag(result.index):
            shares.setdefault(result.index, []).append(f"d_after[{k}]")
    lines, read, names = [], set(), {}
    for index in reversed(range(first + len(program.ops))):
        if index not in shares:
            continue
        if len(shares[index]) == 1 and shares[index][0].startswith("d"):
            names[index] = shares[index][0]
        else:
            names[index] = f"d{index}"
            lines.append(f"const V d{index} = {' + '.join(shares[index])};")
        op = writer.op(index)
        if op is None:
            continue
        derivatives = (_pow_derivative(op),) if op.name == "pow" else DERIVATIVE.get(op.name, ())
        arguments = writer.arguments(op)
        for argument, derivative in zip(op.args, derivatives, strict=False):
            if derivative is None or not isinstance(argument, Ref):
                continue
            if writer.is_flag(argument.index):
                continue
            share = derivative.format(*arguments, g=names[index], y=f"v{index}")
            if "{y}" in derivative:
                read.add(index)
            for j, other in enumerate(op.args):
                if isinstance(other, Ref) and f"{{{j}}}" in derivative:
                    read.add(other.index)
            if share != names[index]:
                share = f"({share})"
            shares.setdefault(argument.index, []).append(share)
    return lines, {i: name for i, name in names.items() if i < first}, read


def _sources_of(program: Program, read: set[int]) -> tuple[list[str], list[int]]:
    """The statements that find the values a derivative reads, and those that must be kept.

    Where these are more than the gates, whose memory they could take, functions of what is in
    memory anyway are computed again too.
    """
    lines, kept = _find_sources(program, read, frozenset())
    first = len(program.leaves)
    known = {result.index for result in program.results if isinstance(result, Ref)}
    known |= {i for i, leaf in enumerate(program.leaves) if leaf.kind in ("state", "extra")}
    again = [
        i for i in kept if i >= first and known.issuperset(_references(program.ops[i - first]))
    ]
    excess = len(kept) - program.gates
    if 0 < excess <= len(again):
        return _find_sources(program, read, frozenset(again[-excess:]))
    return lines, kept


def _find_sources(
    program: Program, read: set[int], recomputed: frozenset[int]
) -> tuple[list[str], list[int]]:
    writer, leaves = _Writer(program), _leaf_expressions(program)
    after = {result.index: k for k, result in enumerate(program.results) if isinstance(result, Ref)}
    order, seen, waiting = [], set(), sorted(read)
    kept: list[int] = []

    def sums_gates(op: Op) -> bool:
        """Whether an operation reads what W_hh gives a gate, which is nowhere in memory."""
        gates = (i for i in _references(op) if i < len(program.leaves))
        return op.name not in COMPARISONS and any(program.leaves[i].kind == "rec" for i in gates)

    while waiting:
        index = waiting.pop()
        if index in seen:
            continue
        seen.add(index)
        order.append(index)
        op = writer.op(index)
        if op is None:
            if program.leaves[index].kind == "rec":
                kept.append(index)
        elif index in after and not writer.is_flag(index):
            pass
        elif index not in recomputed and (op.name in DEAR or sums_gates(op)):
            kept.append(index)
        else:
            waiting.extend(_references(op))
    kept.sort()
    for index in sorted(order):
        op = writer.op(index)
        if index in kept:
            writer.lines.append(f"const V v{index} = kept[{kept.index(index)}];")
        elif op is None:
            writer.lines.append(f"const V v{index} = {leaves[index]};")
        elif index in after and not writer.is_flag(index):
            writer.lines.append(f"const V v{index} = after[{after[index]}];")
        else:
            writer.compute(index)
    return writer.lines, kept


class Columns(NamedTuple):
    """The order of the gradients of the gates, see UserShape in csrc/user_cell/interface.h."""

    input_order: list[int]
    recurrent_order: list[int]
    first_recurrent: int


def _columns(program: Program, names: dict[int, str]) -> Columns:
    """Those gates come first for which what W_ih and W_hh give have gradients of their own."""
    numbers = {(leaf.kind, leaf.key): i for i, leaf in enumerate(program.leaves)}
    gates = range(program.gates)
    apart = []
    if program.uses("rec"):
        found = {kind: [names.get(numbers[kind, g]) for g in gates] for kind in ("pre", "rec")}
        apart = [g for g in gates if found["pre"][g] != found["rec"][g]]
    same = [g for g in gates if g not in apart]
    return Columns(apart + same, same + apart, len(apart))


def _reads_pre(lines: list[str]) -> bool:
    return any("= pre[" in line for line in lines)


def write_cell(program: Program, recurrent: int) -> str:
    """The struct that the time loops take for a cell; W_hh sees state number ``recurrent``."""
    leaves = _leaf_expressions(program)
    first = len(leaves)
    extras = program.extras
    gradient_lines, names, read = _gradients(program)
    read_lines, kept = _sources_of(program, read)

    writer = _Writer(program)
    roots = {result.index for result in program.results if isinstance(result, Ref)} | set(kept)
    live = _live(program, roots)
    for index in live:
        if index < first:
            writer.lines.append(f"const V v{index} = {leaves[index]};")
        else:
            writer.compute(index)
    for k, result in enumerate(program.results):
        writer.lines.append(f"after[{k}] = {writer.argument(result)};")
    writer.lines += [f"kept[{slot}] = v{index};" for slot, index in enumerate(kept)]

    numbers = {(leaf.kind, leaf.key): i for i, leaf in enumerate(program.leaves)}

    def gradient(kind: str, key: int | str) -> str:
        return names.get(numbers.get((kind, key), -1), "V{}")

    columns = _columns(program, names)
    results = [f"d[{c}] = {gradient('pre', g)};" for c, g in enumerate(columns.input_order)]
    apart = columns.recurrent_order[program.gates - columns.first_recurrent :]
    results += [f"d[{program.gates + c}] = {gradient('rec', g)};" for c, g in enumerate(apart)]
    results += [f"d_before[{k}] = {gradient('state', k)};" for k in range(program.states)]
    results += [f"d_extra[{k}] = {gradient('extra', name)};" for k, name in enumerate(extras)]

    constants = {
        "int kGates": program.gates,
        "int kStates": program.states,
        "int kExtras": len(extras),
        "int kKept": len(kept),
        "int kRecurrent": recurrent,
        "int kColumns": program.gates + columns.first_recurrent,
        "bool kReadsPre": str(_reads_pre(read_lines)).lower(),
    }
    body = "\n    "
    return f"""struct UserCell {{
{chr(10).join(f"  static constexpr {name} = {value};" for name, value in constants.items())}

  template <typename V>
  [[gnu::always_inline]] static void forward([[maybe_unused]] const V* pre,
      [[maybe_unused]] const V* rec, [[maybe_unused]] const V* before,
      [[maybe_unused]] const V* extra, V* after, [[maybe_unused]] V* kept) {{
    {body.join(writer.lines)}
  }}

  template <typename V>
  [[gnu::always_inline]] static void backward([[maybe_unused]] const V* pre,
      [[maybe_unused]] const V* before, [[maybe_unused]] const V* after,
      [[maybe_unused]] const V* extra, [[maybe_unused]] const V* kept,
      [[maybe_unused]] const V* d_after, V* d, V* d_before,
      [[maybe_unused]] V* d_extra) {{
    {body.join(read_lines + gradient_lines + results)}
  }}
}};
"""


@dataclass(frozen=True)
class Shape:
    """What a cell's passes must know of it, beside its numbers of gates, states and extras."""

    kept: int  # values of a unit that the forward pass keeps for the derivative
    reads_pre: bool  # whether the derivative reads gates
    columns: Columns

    @property
    def fits_pre(self) -> bool:
        """Whether what is kept may take the place of the gates."""
        return not self.reads_pre and self.kept <= len(self.columns.input_order)


def shape_of(program: Program) -> Shape:
    """That of a program's cell."""
    _, names, read = _gradients(program)
    lines, kept = _sources_of(program, read)
    return Shape(len(kept), _reads_pre(lines), _columns(program, names))


def write_library(program: Program, recurrent: int, dtype: torch.dtype, isa: str) -> str:
    """The source of a library of one cell, for one dtype and instruction set."""
    vec_bytes, macro, _ = INSTRUCTION_SETS[isa]
    define = f"#define {macro}\n" if macro else ""
    return f"""#define FASTBPTT_VEC_BYTES {vec_bytes}
{define}#include "user_cell/library.h"

namespace fastbptt {{
namespace {{

{write_cell(program, recurrent)}
}}  // namespace
}}  // namespace fastbptt

FASTBPTT_USER_LIBRARY(fastbptt::UserCell, {SCALARS[dtype]})
"""
