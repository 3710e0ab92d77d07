"""A layer of a compiled cell on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fastbptt import _C
from fastbptt._layer import Given, Gradients, Kept, Layer, Layout
from fastbptt._program import Program


class _Norm(ctypes.Structure):
    """UserNorm of csrc/user_cell/interface.h."""

    _fields_ = [(name, ctypes.c_int) for name in ("phase", "first_slot", "count")]
    _fields_.append(("eps", ctypes.c_double))


class _Call(ctypes.Structure):
    """UserCall of csrc/user_cell/call.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("is_double T B N I H direction ld_kept").split()),
        ("clip_grad", ctypes.c_double),
        *(
            (name, ctypes.c_int64)
            for name in (
                "gates states kept_values extras recurrent columns first_recurrent phases slots "
                "gradient_slots norms"
            ).split()
        ),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "input_order recurrent_order norm_table forward backward offsets batch_sizes "
                "resets input w_ih w_hh b_ih b_hh initial all_states last extra_data "
                "extra_strides reset_to reset_strides pre kept kappa d_states d_last d_initial "
                "d_extras d_reset_to d_input d_w_ih d_w_hh d_b_ih d_b_hh"
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
        self._isa = isa
        shape = self.shape
        self._library = library  # of which the functions are
        input_order, recurrent_order, first = shape.columns
        int_array = ctypes.c_int * program.gates
        self._orders = int_array(*input_order), int_array(*recurrent_order)
        self._norms = (_Norm * max(1, len(shape.norms)))(*shape.norms)
        self._own = dict(
            is_double=dtype == torch.float64,
            gates=program.gates,
            states=program.states,
            kept_values=shape.kept,
            extras=len(program.extras),
            recurrent=recurrent,
            columns=program.gates + first,
            first_recurrent=first,
            phases=shape.phases,
            slots=shape.slots,
            gradient_slots=shape.gradient_slots,
            norms=len(shape.norms),
            norm_table=ctypes.addressof(self._norms),
            input_order=ctypes.addressof(self._orders[0]),
            recurrent_order=ctypes.addressof(self._orders[1]),
            forward=ctypes.cast(library.fastbptt_cell_forward, ctypes.c_void_p).value,
            backward=ctypes.cast(library.fastbptt_cell_backward, ctypes.c_void_p).value,
        )

    def _run_forward(
        self, layout: Layout, states: list[Tensor], last: list[Tensor], kept: Kept
    ) -> None:
        self._run(layout, False, states, kept, last=last)

    def _run_backward(
        self,
        layout: Layout,
        states: Sequence[Tensor],
        kept: Kept,
        given: Given,
        wanted: Gradients,
        d_initial: list[Tensor | None],
        d_reset_to: list[Tensor | None],
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        own = [layout.tensors[name] for name in ("input", "w_ih", "w_hh", "b_ih", "b_hh")]
        found = [
            torch.empty_like(tensor) if is_wanted and tensor is not None else None
            for tensor, is_wanted in zip(own, wanted[:5], strict=True)
        ]
        H = layout.sizes["H"]
        d_extras = [
            (states[0].new_empty(H) if row_stride == 0 else torch.empty_like(states[0]))
            if w
            else None
            for w, row_stride in zip(wanted[6], layout.strides[::2], strict=True)
        ]
        names = ("d_input", "d_w_ih", "d_w_hh", "d_b_ih", "d_b_hh")
        self._run(
            layout,
            True,
            states,
            kept,
            d_states=given.d_states,
            d_last=given.d_last,
            d_initial=d_initial,
            d_extras=d_extras,
            **({"d_reset_to": d_reset_to} if any(wanted[7]) else {}),
            clip_grad=given.clip_grad,
            kappa=given.kappa,
            **dict(zip(names, found, strict=True)),
        )
        return found, d_extras

    def _run(
        self,
        layout: Layout,
        goes_back: bool,
        states: Sequence[Tensor],
        kept: Kept,
        clip_grad: float = 0.0,
        **more: Tensor | Sequence[Tensor | None] | None,
    ) -> None:
        """A pass, which also takes ``more``: tensors, or lists of them, by their names there."""
        tensors = {**layout.tensors, "pre": kept.pre, "kept": kept.values, **more}
        lists = {"initial": layout.initial, "all_states": states, "extra_data": layout.extras}
        if layout.reset_to:
            lists["reset_to"] = layout.reset_to
        for name, of in more.items():
            if isinstance(of, list):
                lists[name] = tensors.pop(name)
        arrays = {
            name: (ctypes.c_void_p * max(1, len(of)))(
                *(None if tensor is None else tensor.data_ptr() for tensor in of)
            )
            for name, of in lists.items()
        }
        for name, of in (("extra", layout.strides), ("reset", layout.reset_strides)):
            arrays[f"{name}_strides"] = (ctypes.c_int64 * max(1, len(of)))(*of)
        call = _Call(
            **self._own,
            **layout.sizes,
            clip_grad=clip_grad,
            ld_kept=0 if kept.values is None else kept.values.shape[-1],
            **{name: t.data_ptr() for name, t in tensors.items() if t is not None},
            **{name: ctypes.addressof(array) for name, array in arrays.items()},
        )
        if instruction_set() != self._isa:
            raise RuntimeError(
                f"a cell's passes must be in one instruction set: it was {self._isa} when "
                f"the forward pass ran, and is {instruction_set()} now"
            )
        _C.user_cell(ctypes.addressof(call), goes_back)
