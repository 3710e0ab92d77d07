"""A cell's program as the source of a library, which has the cell of the kernels' loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastbptt._adjoint import sources_of, stages_of
from fastbptt._cpp import Writer, leaf_expressions
from fastbptt._phases import Norm, Slots, completed, norms_of, references, slots_of
from fastbptt._program import Program, Ref

#: Bytes of a vector and what vec.h and the compiler must be told, by instruction set.
INSTRUCTION_SETS = {
    "avx512": (
        64,
        "FASTBPTT_AVX512",
        ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
    ),
    "avx2": (32, "FASTBPTT_F16C", ("-mavx2", "-mfma", "-mf16c")),
    "neon": (16, "FASTBPTT_NEON", ()),
    "baseline": (16, None, ()),
}

SCALARS = {torch.float32: "float", torch.float64: "double"}

#: The kernels for products of few rows, in the order of csrc/few_rows.h: rows and columns of a
#: block's tile, and numbers that are loaded at once.
PRODUCT_KERNELS = [(*tile, vector) for vector in (4, 1) for tile in ((4, 4), (8, 8), (16, 8))]


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
            waiting.update(references(program.ops[index - first]))
    return sorted(live)


def _forward_bodies(
    program: Program, norms: tuple[Norm, ...], slots: Slots, kept: list[int]
) -> list[list[str]]:
    """The statements of the forward pass, by phase."""
    leaves, first, phases = leaf_expressions(program), len(program.leaves), program.phases
    bodies = []
    for phase, written in enumerate(slots.written):
        writer = Writer(program)
        ends = phase == len(slots.written) - 1
        own_kept = [i for i in kept if phases[i] == phase]
        waiting = {value.index for value in written if isinstance(value, Ref)} | set(own_kept)
        if ends:
            waiting |= {result.index for result in program.results if isinstance(result, Ref)}
        needed: set[int] = set()
        while waiting:
            index = waiting.pop()
            needed.add(index)
            op = writer.op(index)
            if op is not None and phases[index] == phase and op.name != "normalized":
                waiting |= set(references(op)) - needed
        for index in sorted(needed):
            is_rec = index < first and program.leaves[index].kind == "rec"
            if index < first and not (is_rec and phase > 0):
                writer.lines.append(f"const V v{index} = {leaves[index]};")
            elif phases[index] == phase:
                writer.compute(index, norms, slots)
            else:
                is_set = " != 0" if writer.is_flag(index) else ""
                writer.lines.append(
                    f"const auto v{index} = slots[{slots.of_values[index]}]{is_set};"
                )
        begin = slots.ends[phase] - len(written)
        for slot, value in enumerate(written, begin):
            writer.lines.append(f"slots[{slot}] = {writer.argument(value)};")
        for n, norm in enumerate(norms):
            if norm.phase == phase + 1:
                own = range(slots.of_norms[n], slots.of_norms[n] + len(norm.values))
                writer.lines.append(f"sums[{n}] = {' + '.join(f'slots[{i}]' for i in own)};")
        if ends:
            for k, result in enumerate(program.results):
                writer.lines.append(f"after[{k}] = {writer.argument(result)};")
        writer.lines += [f"kept[{kept.index(i)}] = v{i};" for i in own_kept]
        bodies.append(writer.lines)
    return bodies


class Columns(NamedTuple):
    """The order of the gradients of the gates, see UserShape in csrc/user_cell/interface.h."""

    input_order: list[int]
    recurrent_order: list[int]
    first_recurrent: int


class _Cell:
    """All that is written of a program."""

    def __init__(self, program: Program):
        self.program = program = completed(program)
        self.norms = norms_of(program)
        self.stages = stages_of(program, self.norms)
        read = set().union(*(stage.read for stage in self.stages))
        self.sources = sources_of(program, self.norms, read)
        self.kept = self.sources.kept
        roots = {result.index for result in program.results if isinstance(result, Ref)}
        self.slots = slots_of(program, self.norms, _live(program, roots | set(self.kept)))
        self.source_lines = [self.sources.lines(stage.read) for stage in self.stages]

    @property
    def reads_pre(self) -> bool:
        return any("= pre[" in line for lines in self.source_lines for line in lines)

    def gradient(self, kind: str, key: int | str) -> tuple[int, str]:
        """The phase in which a leaf's gradient is found, and its name there."""
        index = next(i for i, x in enumerate(self.program.leaves) if (x.kind, x.key) == (kind, key))
        for phase, stage in enumerate(self.stages):
            if index in stage.names:
                return phase, stage.names[index]
        return 0, "V{}"

    @property
    def columns(self) -> Columns:
        """Those gates come first for which what W_ih and W_hh give have gradients of their own."""
        gates = range(self.program.gates)
        apart = []
        if self.program.uses("rec"):
            apart = [g for g in gates if self.gradient("pre", g) != self.gradient("rec", g)]
        same = [g for g in gates if g not in apart]
        return Columns(apart + same, same + apart, len(apart))


def write_cell(program: Program, recurrent: int) -> str:
    """The struct that the time loops take for a cell; W_hh sees state number ``recurrent``."""
    cell = _Cell(program)
    gates, columns = program.gates, cell.columns
    apart = columns.recurrent_order[gates - columns.first_recurrent :]
    found = [("d", c, cell.gradient("pre", g)) for c, g in enumerate(columns.input_order)]
    found += [("d", gates + c, cell.gradient("rec", g)) for c, g in enumerate(apart)]
    found += [("d_before", k, cell.gradient("state", k)) for k in range(program.states)]
    found += [("d_extra", k, cell.gradient("extra", e)) for k, e in enumerate(program.extras)]
    constants = {
        "kGates": gates,
        "kStates": program.states,
        "kExtras": len(program.extras),
        "kKept": len(cell.kept),
        "kRecurrent": recurrent,
        "kColumns": gates + columns.first_recurrent,
        "kPhases": len(cell.stages),
        "kSlots": cell.slots.ends[-1],
        "kGradientSlots": cell.stages[0].slots_end,
        "kNorms": len(cell.norms),
    }
    phases = [cell.program.phases[i] for i in cell.kept]
    arrays = {
        "kSlotEnds": cell.slots.ends,
        "kGradientSlotEnds": [stage.slots_end for stage in cell.stages],
        "kNormPhases": [norm.phase for norm in cell.norms],
        "kKeptEnds": [sum(p <= phase for p in phases) for phase in range(len(cell.stages))],
        **{
            f"kPhaseOf_{kind}": [phase for name, _, (phase, _) in found if name == kind]
            for kind in ("d", "d_before", "d_extra")
        },
    }
    if cell.norms:
        arrays["kNormSlots"] = [cell.slots.of_norms[n] for n in range(len(cell.norms))]
        arrays["kNormCounts"] = [len(norm.values) for norm in cell.norms]
    lines = [f"static constexpr int {name} = {value};" for name, value in constants.items()]
    if cell.norms:
        eps = ", ".join(norm.eps.hex() for norm in cell.norms)
        lines.append(f"static constexpr double kNormEps[] = {{{eps}}};")
    lines.append(f"static constexpr bool kReadsPre = {str(cell.reads_pre).lower()};")
    for name, values in arrays.items():
        lines.append(f"static constexpr int {name}[] = {{{', '.join(map(str, values or [0]))}}};")
    functions = []
    bodies = _forward_bodies(cell.program, cell.norms, cell.slots, cell.kept)
    for phase, (body, stage) in enumerate(zip(bodies, cell.stages, strict=True)):
        results = [f"{name}[{k}] = {d};" for name, k, (p, d) in found if p == phase]
        derivative = cell.source_lines[phase] + stage.lines + results
        functions.append(_function(phase, "forward", FORWARD_ARGUMENTS, body))
        functions.append(_function(phase, "backward", BACKWARD_ARGUMENTS, derivative))
    return f"""struct UserCell {{
  {f"{chr(10)}  ".join(lines)}

{chr(10).join(functions)}}};
"""


FORWARD_ARGUMENTS = (
    "const V* pre, const V* rec, const V* before, const V* extra, const V* mean, const V* scale, "
    "V* slots, V* sums, V* after, V* kept"
)
BACKWARD_ARGUMENTS = (
    "const V* pre, const V* before, const V* after, const V* extra, const V* kept, "
    "const V* mean, const V* scale, const V* d_mean, const V* d_scale, const V* d_after, "
    "V* d_slots, V* sums, V* d, V* d_before, V* d_extra"
)


def _function(phase: int, name: str, arguments: str, body: list[str]) -> str:
    given = ",\n      ".join(f"[[maybe_unused]] {each}" for each in arguments.split(", "))
    lines = "\n    ".join(body)
    return f"""  template <typename V>
  [[gnu::always_inline]] FASTBPTT_HD static void {name}(Phase<{phase}>,
      {given}) {{
    {lines}
  }}
"""


class NormPlace(NamedTuple):
    """Values that are normalized together, as UserNorm in csrc/user_cell/interface.h."""

    phase: int
    first_slot: int
    count: int
    eps: float


@dataclass(frozen=True)
class Shape:
    """What a cell's passes must know of it, beside its numbers of gates, states and extras."""

    kept: int  # values of a unit that the forward pass keeps for the derivative
    reads_pre: bool  # whether the derivative reads gates
    columns: Columns
    phases: int
    slots: int
    gradient_slots: int
    norms: tuple[NormPlace, ...]

    @property
    def fits_pre(self) -> bool:
        """Whether what is kept may take the place of the gates."""
        is_no_more = self.kept <= len(self.columns.input_order)
        return is_no_more and not self.reads_pre and not self.norms

    @property
    def keeps_pre(self) -> bool:
        """Whether the gates are kept, or their place is."""
        return self.reads_pre or (self.fits_pre and self.kept > 0)


def shape_of(program: Program) -> Shape:
    """That of a program's cell."""
    cell = _Cell(program)
    first_slots = cell.slots.of_norms
    return Shape(
        len(cell.kept),
        cell.reads_pre,
        cell.columns,
        len(cell.stages),
        cell.slots.ends[-1],
        cell.stages[0].slots_end,
        tuple(
            NormPlace(norm.phase, first_slots[n], len(norm.values), norm.eps)
            for n, norm in enumerate(cell.norms)
        ),
    )


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


def write_kernels(program: Program, recurrent: int, dtype: torch.dtype) -> str:
    """The source of the kernels of one cell on a GPU, for one dtype."""
    return f"""#include "user_cell/kernels.cuh"

namespace fastbptt {{
namespace {{

{write_cell(program, recurrent)}
}}  // namespace
}}  // namespace fastbptt

FASTBPTT_USER_KERNELS(fastbptt::UserCell, {SCALARS[dtype]})
"""


def write_products() -> str:
    """The source of the products' kernels on a GPU, which all cells share."""
    kernels = [f"FASTBPTT_PRODUCT_KERNEL{kernel}" for kernel in PRODUCT_KERNELS]
    return "\n".join(['#include "user_cell/product.cuh"', *kernels, ""])
