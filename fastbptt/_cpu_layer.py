"""A layer of a compiled cell on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fastbptt import _C
from fastbptt._layer import Arguments, Gradients, Kept, Layer
from fastbptt._program import Program


class _Norm(ctypes.Structure):
    """UserNorm of csrc/user_cell/interface.h."""

    _fields_ = [(name, ctypes.c_int) for name in ("phase", "first_slot", "count")]
    _fields_.append(("eps", ctypes.c_double))


class _Cell(ctypes.Structure):
    """UserCell of csrc/user_cell/call.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "is_double gates states kept_values extras recurrent columns first_recurrent "
                "phases slots gradient_slots norms keeps_pre fits_pre"
            ).split()
        ),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "input_order recurrent_order norm_table extra_names isa forward backward"
            ).split()
        ),
    ]


def instruction_set() -> str:
    """The one in use, of those that cells are compiled for."""
    return _C.cpu_isa().removesuffix("_bf16")


class CpuLayer(Layer):
    """By the steps of a library that the user's compiler has made of the cell."""

    def __init__(
        self, program: Program, dtype: torch.dtype, isa: str, recurrent: int, library: ctypes.CDLL
    ):
        super().__init__(program, recurrent)
        shape = self.shape
        input_order, recurrent_order, first = shape.columns
        int_array = ctypes.c_int * program.gates
        names = [name.encode() for name in program.extras]
        memory = dict(
            input_order=int_array(*input_order),
            recurrent_order=int_array(*recurrent_order),
            norm_table=(_Norm * max(1, len(shape.norms)))(*shape.norms),
            extra_names=(ctypes.c_char_p * max(1, len(names)))(*names),
            isa=ctypes.create_string_buffer(isa.encode()),
        )
        self._memory = library, memory  # that the cell points into
        self._cell = _Cell(
            is_double=dtype == torch.float64,
            gates=program.gates,
            states=program.states,
            kept_values=shape.kept,
            extras=len(names),
            recurrent=recurrent,
            columns=program.gates + first,
            first_recurrent=first,
            phases=shape.phases,
            slots=shape.slots,
            gradient_slots=shape.gradient_slots,
            norms=len(shape.norms),
            keeps_pre=shape.keeps_pre,
            fits_pre=shape.fits_pre,
            forward=ctypes.cast(library.fastbptt_cell_forward, ctypes.c_void_p).value,
            backward=ctypes.cast(library.fastbptt_cell_backward, ctypes.c_void_p).value,
            **{name: ctypes.addressof(each) for name, each in memory.items()},
        )
        self._address = ctypes.addressof(self._cell)

    def forward(self, of: Arguments, keep: bool = True) -> tuple[list[Tensor], list[Tensor], Kept]:
        states, last, *kept = _C.user_forward(self._address, *of, keep)
        return states, last, Kept(*kept)

    def backward(
        self,
        of: Arguments,
        states: Sequence[Tensor],
        kept: Kept,
        d_states: Sequence[Tensor | None],
        d_last: Sequence[Tensor | None] = (),
        kappa: Tensor | None = None,
        clip_grad: float | None = None,
        wanted: Gradients | None = None,
    ) -> Gradients:
        wanted = wanted or self._all(of)
        given = d_states, d_last, kappa, clip_grad or 0.0
        found = _C.user_backward(self._address, *of, states, *kept, *given, *wanted)
        return Gradients(*found)
