"""Cells that the user's own compiler has made kernels of: one direction of a layer."""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastbptt import _C, _codegen, _compiler
from fastbptt._program import Program

#: As in csrc/cpu/gemm.h.
MOST_GATES = 128

_layers: dict[tuple, Layer | None] = {}
_lock = threading.Lock()
_said: set[str] = set()


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


def layer(
    program: Program, dtype: torch.dtype, device: torch.device | str = "cpu", recurrent: int = 0
) -> Layer | None:
    """The compiled cell, or None where there is none: where it should be, a warning says once why.

    Args:
        program: the cell's function, of at most 128 gates; there are no compiled cells with more.
        dtype: likewise float32 or float64.
        device: likewise the CPU.
        recurrent: the number of the state that W_hh sees.
    """
    is_there = dtype in _codegen.SCALARS and program.gates <= MOST_GATES
    if not is_there or torch.device(device).type != "cpu":
        return None
    isa = instruction_set()
    key = repr(program), recurrent, dtype, isa  # as text: 0.0 and -0.0 are equal
    with _lock:
        if key not in _layers:
            try:
                source = _codegen.write_library(program, recurrent, dtype, isa)
                library = _compiler.library(source, _codegen.INSTRUCTION_SETS[isa][2])
                _layers[key] = Layer(program, dtype, isa, recurrent, library)
            except _compiler.Unavailable as error:
                _layers[key] = None
                message = str(error)
                if message not in _said:
                    _said.add(message)
                    warnings.warn(
                        f"fastbptt could not compile a cell, which runs step by step: {message}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
        return _layers[key]


def instruction_set() -> str:
    """The one in use, of those that cells are compiled for."""
    return _C.cpu_isa().removesuffix("_bf16")


def available(
    program: Program, dtype: torch.dtype, device: torch.device | str = "cpu", recurrent: int = 0
) -> bool:
    """Whether there is a compiled cell, which is compiled if it was not yet."""
    return layer(program, dtype, device, recurrent) is not None


class Arguments(NamedTuple):
    """Of a layer in one direction.

    Axes as in the kernels: T steps, B sequences, I inputs, H units, G gates. A packed batch has N
    rows in place of [T, B], those of step t from ``sum(batch_sizes[:t])`` on, ``batch_sizes[t]`` of
    them.
    """

    x: Tensor  # [T, B, I]
    w_ih: Tensor  # [G*H, I]
    w_hh: Tensor | None  # [G*H, H]; None where the cell does not use it
    b_ih: Tensor | None  # [G*H]
    b_hh: Tensor | None  # [G*H]
    initial: Sequence[Tensor | None]  # for each state [B, H], or None: zeros
    extras: Sequence[Tensor | float] = ()  # each a number, [H], [T, B, H] or [T, B, 1]
    resets: Tensor | None = None  # bool [T, B]: the states that enter this step are zeros
    batch_sizes: Tensor | None = None  # int64 [T], of a packed batch
    direction: int = 1  # or -1: from the last step to the first
    reset_to: Sequence[Tensor] = ()  # for each state [T, B, H], what it is at a reset; else zeros


class Kept(NamedTuple):
    """What a forward pass leaves for its backward pass; the same tensor, or None: not needed."""

    pre: Tensor | None  # [N, G*H] the input's part of the gates
    values: Tensor | None  # [N, ...]


class Gradients(NamedTuple):
    """Of a layer's arguments; None where it is not wanted, or there is no such argument."""

    x: Tensor | None
    w_ih: Tensor | None
    w_hh: Tensor | None
    b_ih: Tensor | None
    b_hh: Tensor | None
    initial: list[Tensor | None]
    extras: list[Tensor | None]
    reset_to: list[Tensor | None]


class Layer:
    """The recurrence of one direction of a layer of a compiled cell."""

    def __init__(
        self, program: Program, dtype: torch.dtype, isa: str, recurrent: int, library: ctypes.CDLL
    ):
        self.program = program
        self._isa = isa
        self._shape = shape = _codegen.shape_of(program)
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

    def forward(self, of: Arguments, keep: bool = True) -> tuple[list[Tensor], list[Tensor], Kept]:
        """Every state after every step, [T, B, H] each, and after the last, [B, H] each.

        And what ``backward`` needs, if ``keep``.
        """
        call = _Layout(self, of)
        x, shape = of.x, self._shape
        N, H, G = call.sizes["N"], call.sizes["H"], self.program.gates
        states = [x.new_empty(*x.shape[:-1], H) for _ in range(self.program.states)]
        last = [x.new_empty(call.sizes["B"], H) for _ in states]
        pre = values = None
        if keep and (shape.reads_pre or (shape.fits_pre and shape.kept > 0)):
            pre = x.new_empty(N, G * H)
        width = shape.kept * H + 2 * len(shape.norms)
        if keep and width > 0:
            values = pre if shape.fits_pre else x.new_empty(N, width)
        kept = Kept(pre, values)
        call.run(False, states, kept, last=last)
        return states, last, kept

    def backward(
        self,
        of: Arguments,
        states: Sequence[Tensor],
        kept: Kept,
        d_states: Sequence[Tensor | None],
        d_last: Sequence[Tensor | None] | None = None,
        kappa: Tensor | None = None,
        clip_grad: float | None = None,
        wanted: Gradients | None = None,
    ) -> Gradients:
        """The gradients of the arguments of ``forward``.

        Those of the extras and of ``reset_to`` are [T, B, H] each, or [H] of an extra that all rows
        have alike, to be summed by who gave fewer numbers.

        Args:
            of: the same.
            states, kept: what ``forward`` gave.
            d_states: for each state [T, B, H], or None: zeros.
            d_last: for each state [B, H], or None: zeros.
            kappa: [T, B], what of a gradient passes between a step and the one before it, or None:
                all. At a reset nothing passes.
            clip_grad: the bound of what comes to the states that enter a step, before kappa.
            wanted: true for the gradients that are wanted; None: all.
        """
        call, x, program = _Layout(self, of), of.x, self.program
        if wanted is None:
            yes = True
            wanted = Gradients(
                *[yes] * 5,
                [yes] * program.states,
                [yes] * len(program.extras),
                [yes] * len(of.reset_to),
            )
        found = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format)
            if is_wanted and tensor is not None
            else None
            for tensor, is_wanted in zip(of[:5], wanted[:5], strict=True)
        ]
        # A sequence whose first state is reset has none.
        d_initial = [
            x.new_zeros(call.sizes["B"], call.sizes["H"]) if w else None for w in wanted[5]
        ]
        d_extras = [
            (x.new_empty(call.sizes["H"]) if row_stride == 0 else torch.empty_like(states[0]))
            if w
            else None
            for w, row_stride in zip(wanted[6], call.strides[::2], strict=True)
        ]
        d_reset_to = [torch.zeros_like(states[0]) if w else None for w in wanted[7]]
        d_last = [None] * program.states if d_last is None else d_last
        names = ("d_input", "d_w_ih", "d_w_hh", "d_b_ih", "d_b_hh")
        call.run(
            True,
            states,
            kept,
            d_states=[None if d is None else d.to(x.dtype).contiguous() for d in d_states],
            d_last=[None if d is None else d.to(x.dtype).contiguous() for d in d_last],
            d_initial=d_initial,
            d_extras=d_extras,
            **({"d_reset_to": d_reset_to} if any(wanted[7]) else {}),
            clip_grad=clip_grad or 0.0,
            kappa=None if kappa is None else kappa.to(x.dtype).contiguous(),
            **dict(zip(names, found, strict=True)),
        )
        return Gradients(*found, d_initial, d_extras, d_reset_to)


class _Layout:
    """The arguments of a call as the kernels read them: side by side, with their sizes."""

    def __init__(self, layer: Layer, of: Arguments):
        self._layer = layer
        x, rows = of.x.contiguous(), of.x.shape[:-1]
        H = of.w_ih.shape[0] // layer.program.gates
        offsets, batch_sizes = None, of.batch_sizes
        if batch_sizes is None:
            T, B = rows
        else:
            batch_sizes = batch_sizes.to(torch.int64).contiguous()
            offsets = torch.zeros(len(batch_sizes) + 1, dtype=torch.int64)
            torch.cumsum(batch_sizes, 0, out=offsets[1:])
            T, B = len(batch_sizes), int(batch_sizes[0])
        self.sizes = dict(T=T, B=B, N=rows.numel(), I=x.shape[-1], H=H, direction=of.direction)
        self._tensors = dict(
            offsets=offsets,
            batch_sizes=batch_sizes,
            resets=of.resets,
            input=x,
            w_ih=of.w_ih,
            w_hh=of.w_hh,
            b_ih=of.b_ih,
            b_hh=of.b_hh,
        )
        for name, tensor in self._tensors.items():
            self._tensors[name] = None if tensor is None else tensor.contiguous()
        self._extras, self.strides = self._read_extras(of.extras, x, H)
        self._initial = [None if h is None else h.contiguous() for h in of.initial]
        self._reset_to, self._reset_strides = [], []
        for value in of.reset_to:
            self._add_reset_to(value.detach(), is_packed=batch_sizes is not None)

    def _add_reset_to(self, value: Tensor, is_packed: bool) -> None:
        """With strides by row and by sequence, where it is the same at all steps."""
        H = value.shape[-1]
        if is_packed or value.stride(0) > 0:
            self._reset_strides += [H, 0]
        else:
            value = value[0]
            self._reset_strides += [0, H]
        self._reset_to.append(value.contiguous())

    def _read_extras(
        self, extras: Sequence[Tensor | float], x: Tensor, H: int
    ) -> tuple[list[Tensor], list[int]]:
        """As tensors, and their strides by row and by unit."""
        tensors, strides, rows = [], [], x.shape[:-1]
        for name, extra in zip(self._layer.program.extras, extras, strict=True):
            if not isinstance(extra, Tensor):
                extra = x.new_tensor(float(extra))
            extra = extra.to(x.dtype).contiguous()
            shape = extra.shape
            if shape == () or shape == (1,):
                strides += [0, 0]
            elif shape == (H,):
                strides += [0, 1]
            elif shape == (*rows, H):
                strides += [H, 1]
            elif shape == (*rows, 1):
                strides += [1, 0]
            else:
                raise ValueError(
                    f"{name} must be a number, [{H}], {[*rows, H]} or {[*rows, 1]}, "
                    f"got {list(shape)}"
                )
            tensors.append(extra)
        return tensors, strides

    def run(
        self,
        goes_back: bool,
        states: Sequence[Tensor],
        kept: Kept,
        clip_grad: float = 0.0,
        **more: Tensor | Sequence[Tensor | None] | None,
    ) -> None:
        """A pass, which also takes ``more``: tensors, or lists of them, by their names there."""
        tensors = {**self._tensors, "pre": kept.pre, "kept": kept.values, **more}
        lists = {"initial": self._initial, "all_states": states, "extra_data": self._extras}
        if self._reset_to:
            lists["reset_to"] = self._reset_to
        for name, of in more.items():
            if isinstance(of, list):
                lists[name] = tensors.pop(name)
        arrays = {
            name: (ctypes.c_void_p * max(1, len(of)))(
                *(None if tensor is None else tensor.data_ptr() for tensor in of)
            )
            for name, of in lists.items()
        }
        for name, of in (("extra", self.strides), ("reset", self._reset_strides)):
            arrays[f"{name}_strides"] = (ctypes.c_int64 * max(1, len(of)))(*of)
        call = _Call(
            **self._layer._own,
            **self.sizes,
            clip_grad=clip_grad,
            ld_kept=0 if kept.values is None else kept.values.shape[-1],
            **{name: t.data_ptr() for name, t in tensors.items() if t is not None},
            **{name: ctypes.addressof(array) for name, array in arrays.items()},
        )
        if instruction_set() != self._layer._isa:
            raise RuntimeError(
                f"a cell's passes must be in one instruction set: it was {self._layer._isa} when "
                f"the forward pass ran, and is {instruction_set()} now"
            )
        _C.user_cell(ctypes.addressof(call), goes_back)
