"""A layer of a compiled cell on a GPU: products by torch, and one kernel for each step.

What W_ih gives is a product for all steps before the first one; then each step is a product with
W_hh and a kernel that does the rest of the cell. The backward pass goes likewise, and at its end
the gradients of weights and inputs are products over all steps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastbptt import _C
from fastbptt._layer import Arguments, Gradients, Kept, Layer
from fastbptt._program import Program

_WARP = 32  # threads
#: Bytes of a kernel's arguments that every driver takes; UserStep is among them.
_MOST_ARGUMENTS = 4096 - 64
#: Of more rows the library's products are faster where they may round to tf32.
_EXACT_ROWS = 32


class Kernels(Protocol):
    """A cell's kernels, and what launches them.

    Attributes:
        forward, backward, finish: what ``launch`` knows them by.
        products: likewise, those of csrc/few_rows.h in their order.
        launch: the address of a function with the arguments of CUDA's ``cuLaunchKernel``.
    """

    forward: int
    backward: int
    finish: int
    products: Sequence[int]
    launch: int

    def stream(self) -> AbstractContextManager[int]:
        """Makes the kernels' device the current one; gives the handle of its current stream."""

    def error(self, number: int) -> str:
        """What a number that ``launch`` gave means."""


class _Call(ctypes.Structure):
    """UserStepsCall of csrc/user_cell/steps.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("T", "B", "direction")),
        *(
            (name, ctypes.c_void_p)
            for name in "batch_sizes launch kernel finish stream arguments".split()
        ),
        *((name, ctypes.c_int64) for name in ("blocks_of_row", "threads", "shared_bytes")),
        ("products", ctypes.c_void_p * 6),
    ]


def _arguments_of(states: int, extras: int) -> type[ctypes.Structure]:
    """UserArguments of csrc/user_cell/kernels.cuh, for a cell of so many."""
    pointer, E = ctypes.c_void_p, max(1, extras)
    of_states = "initial states reset_to last d_states d_last d_initial d_reset_to".split()

    class UserArguments(ctypes.Structure):
        _fields_ = [
            *((name, ctypes.c_longlong) for name in "H blocks_of_row direction ld_kept".split()),
            ("clip_grad", ctypes.c_double),
            *(
                (name, pointer)
                for name in (
                    "b_ih b_hh resets pre kept product entering slots kappa d carry".split()
                )
            ),
            *((name, pointer * states) for name in of_states),
            *((name, pointer * E) for name in ("extras", "d_extras")),
            ("reset_by_row", ctypes.c_int * states),
            *((name, ctypes.c_int * E) for name in ("extra_by_row", "extra_by_unit")),
        ]

    return UserArguments


def fits(program: Program) -> bool:
    """Whether a kernel can take the arguments of such a cell."""
    return ctypes.sizeof(_arguments_of(program.states, len(program.extras))) <= _MOST_ARGUMENTS


class _Products(NamedTuple):
    """UserProducts of csrc/user_cell/steps.h."""

    rows: Tensor
    weight: Tensor
    product: Tensor

    @classmethod
    def of(cls, rows: Tensor, weight: Tensor, product: Tensor) -> _Products:
        """With the weight as the products need it, which is copied once for all steps."""
        products = cls(rows, weight, product)
        if products.are_of_few_rows and weight.stride(0) != 1:
            return cls(rows, weight.t().contiguous().t(), product)
        return products

    @property
    def are_of_few_rows(self) -> bool:
        rows, is_float = self.product.shape[0], self.weight.dtype == torch.float32
        are_few = is_float and _C.are_few_rows(rows, self.weight.numel())
        return are_few and (rows <= _EXACT_ROWS or not _C.allows_tf32())


class _Layout:
    """The arguments of a call as the kernels read them; UserLayout of csrc/user_cell/layout.h.

    Attributes:
        sizes: T, B, N (rows), I, H and the direction.
        tensors: what is there once, by name, or None.
        initial, extras, reset_to: of each, where they are given.
        strides: of each extra by row and by unit.
        reset_strides: of each state of ``reset_to`` by row and by sequence.
    """

    def __init__(self, program: Program, of: Arguments):
        sizes, tensors, *each = _C.read_user_arguments(program.gates, program.extras, *of)
        self.sizes = dict(zip("TBNIH", sizes, strict=True), direction=of.direction)
        names = "input w_ih w_hh b_ih b_hh resets batch_sizes".split()
        self.tensors = dict(zip(names, tensors, strict=True))
        self.initial, self.extras, self.strides, self.reset_to, self.reset_strides = each


class DeviceLayer(Layer):
    """By a cell's kernels."""

    def __init__(self, program: Program, recurrent: int, kernels: Kernels):
        super().__init__(program, recurrent)
        self._kernels = kernels

    @cached_property
    def _arguments(self) -> type[ctypes.Structure]:
        return _arguments_of(self.program.states, len(self.program.extras))

    @torch.no_grad()
    def forward(self, of: Arguments, keep: bool = True) -> tuple[list[Tensor], list[Tensor], Kept]:
        layout, shape, x = _Layout(self.program, of), self.shape, of.x
        tensors, (B, N, H) = layout.tensors, (layout.sizes[name] for name in "BNH")
        columns = self.program.gates * H
        states = [x.new_empty(*x.shape[:-1], H) for _ in range(self.program.states)]
        last = [x.new_empty(B, H) for _ in states]
        pre, values = x.new_empty(N, columns), None
        width = shape.kept * H + 2 * len(shape.norms)
        if keep and width > 0:
            values = pre if shape.fits_pre else x.new_empty(N, width)
        with self._kernels.stream() as stream:
            torch.mm(tensors["input"].view(N, -1), tensors["w_ih"].t(), out=pre)
            products = None
            if tensors["w_hh"] is not None:
                weight, product = tensors["w_hh"].t(), x.new_empty(B, columns)
                products = _Products.of(self._first_entering(layout), weight, product)
            self._run(
                layout,
                stream,
                False,
                products,
                pre=pre,
                kept=values,
                states=states,
                last=last,
                entering=None if products is None else products.rows,
                slots=x.new_empty(B, shape.slots, H) if shape.slots else None,
            )
        return states, last, Kept(pre if keep and shape.keeps_pre else None, values)

    def _first_entering(self, layout: _Layout) -> Tensor:
        """What W_hh sees at the first step of each sequence, [B, H], in memory of its own."""
        x, k = layout.tensors["input"], self.recurrent
        B, H = layout.sizes["B"], layout.sizes["H"]
        given, resets = layout.initial[k], layout.tensors["resets"]
        entering = x.new_zeros(B, H) if given is None else given.clone()
        if resets is not None and layout.sizes["direction"] > 0:
            is_reset = resets.view(-1)[:B, None]
            if not layout.reset_to:
                return entering.masked_fill_(is_reset, 0.0)
            entering = torch.where(is_reset, layout.reset_to[k].view(-1, H)[:B], entering)
        return entering

    @torch.no_grad()
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
        layout, wanted = _Layout(self.program, of), wanted or self._all(of)
        tensors, x = layout.tensors, layout.tensors["input"]
        states, kept = _contiguous(states, x.dtype), Kept(*_contiguous(kept, x.dtype))
        B, N, H = (layout.sizes[name] for name in "BNH")
        # A sequence whose first state is reset has none.
        d_initial = [x.new_zeros(B, H) if w else None for w in wanted.initial]
        d_reset_to = [torch.zeros_like(states[0]) if w else None for w in wanted.reset_to]
        shape, w_hh, width = self.shape, tensors["w_hh"], self.program.gates * H
        input_order, recurrent_order, first = shape.columns
        with self._kernels.stream() as stream:
            d = x.new_empty(N, width + first * H)
            d_in, d_rec = d[:, :width], d[:, first * H :]
            d_extras = [x.new_empty(N, H) if w else None for w in wanted.extras]
            entering = x.new_empty(N, H) if w_hh is not None and wanted.w_hh else None
            products = None
            if w_hh is not None:
                weight = _in_order(w_hh, recurrent_order)
                products = _Products.of(d_rec, weight, x.new_empty(B, H))
            self._run(
                layout,
                stream,
                True,
                products,
                pre=kept.pre if shape.reads_pre else None,
                kept=kept.values,
                states=states,
                entering=entering,
                slots=x.new_empty(B, shape.gradient_slots, H) if shape.gradient_slots else None,
                kappa=_contiguous([kappa], x.dtype)[0],
                clip_grad=clip_grad or 0.0,
                d=d,
                carry=x.new_empty(B, self.program.states, H),
                d_states=_contiguous(d_states, x.dtype),
                d_last=_contiguous(d_last, x.dtype),
                d_initial=d_initial,
                d_reset_to=d_reset_to or None,
                d_extras=d_extras,
            )
            found: list[Tensor | None] = [None] * 5
            if wanted.x:
                found[0] = _sum_products(d_in, _in_order(tensors["w_ih"], input_order)).view_as(x)
            if wanted.w_ih:
                sums = _sum_products(d_in.t(), x.view(N, -1))
                found[1] = _in_order(sums, _inverse(input_order))
            if entering is not None:
                sums = _sum_products(d_rec.t(), entering)
                found[2] = _in_order(sums, _inverse(recurrent_order))
            for i, (name, own, order) in enumerate(
                [("b_ih", d_in, input_order), ("b_hh", d_rec, recurrent_order)], 3
            ):
                if wanted[i] and tensors[name] is not None:
                    found[i] = _in_order(own.sum(0), _inverse(order))
            of_extras = [
                d if d is None else d.sum(0) if row_stride == 0 else d.view_as(states[0])
                for d, row_stride in zip(d_extras, layout.strides[::2], strict=True)
            ]
        return Gradients(*found, d_initial, of_extras, d_reset_to)

    def _run(
        self,
        layout: _Layout,
        stream: int,
        goes_back: bool,
        products: _Products | None,
        clip_grad: float = 0.0,
        **more: Any,
    ) -> None:
        """All steps, and after the last one back what ``d_initial`` and ``d_reset_to`` get.

        Args:
            more: of UserArguments, tensors or lists of them by name.
        """
        tensors, H, kept = layout.tensors, layout.sizes["H"], more["kept"]
        has_norms, count = len(self.shape.norms) > 0, len(self.program.extras)
        threads = min(512 if has_norms else 256, -(-H // _WARP) * _WARP)
        blocks_of_row = 1 if has_norms else -(-H // threads)
        sums = (2 if goes_back else 1) * len(self.shape.norms)
        arguments = self._arguments(
            H=H,
            blocks_of_row=blocks_of_row,
            direction=layout.sizes["direction"],
            ld_kept=0 if kept is None else kept.shape[-1],
            clip_grad=clip_grad,
        )
        more |= {name: tensors[name] for name in ("b_ih", "b_hh", "resets")}
        more |= {"initial": layout.initial, "extras": layout.extras}
        more["product"] = None if products is None else products.product
        more["reset_to"] = layout.reset_to or None
        for name, given in more.items():
            if isinstance(given, Tensor):
                setattr(arguments, name, given.data_ptr())
            elif given is not None:
                array = getattr(arguments, name)
                for i, each in enumerate(given):
                    array[i] = None if each is None else each.data_ptr()
        for k, stride in enumerate(layout.reset_strides[::2]):
            arguments.reset_by_row[k] = stride > 0
        for k in range(count):
            by_row, by_unit = layout.strides[2 * k : 2 * k + 2]
            arguments.extra_by_row[k], arguments.extra_by_unit[k] = by_row > 0, by_unit > 0
        is_finished = goes_back and any(
            d is not None for d in (*more["d_initial"], *(more["d_reset_to"] or ()))
        )
        kernels, batch_sizes = self._kernels, tensors["batch_sizes"]
        call = _Call(
            *(layout.sizes[name] for name in ("T", "B", "direction")),
            None if batch_sizes is None else batch_sizes.data_ptr(),
            kernels.launch,
            kernels.backward if goes_back else kernels.forward,
            kernels.finish if is_finished else None,
            stream,
            ctypes.addressof(arguments),
            blocks_of_row,
            threads,
            threads // _WARP * sums * tensors["input"].element_size(),
        )
        if products is not None and products.are_of_few_rows:
            call.products[:] = kernels.products
        error = _C.user_cell_steps(
            ctypes.addressof(call), goes_back, *(products or (None, None, None))
        )
        if error:
            raise RuntimeError(f"a cell's kernel could not be launched: {kernels.error(error)}")


def _contiguous(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if each is None else each.to(dtype).resolve_neg().contiguous() for each in tensors]


def _in_order(rows: Tensor, order: Sequence[int]) -> Tensor:
    """Rows [G*H, ...] with gate ``order[0]`` first, and so on."""
    if list(order) == sorted(order):
        return rows
    gates = rows.chunk(len(order))
    return torch.cat([gates[g] for g in order])


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _sum_products(a: Tensor, b: Tensor) -> Tensor:
    """The product of a and b, in float32 with long sums in blocks.

    The library may add up one product after another, and lose about sqrt(n) / 5 units in the last
    place of n; as in csrc/cuda/torch/ops_cuda.cpp.
    """
    n = a.shape[1]
    count = min(8, -(-n // 256)) if a.dtype == torch.float32 else 1
    bounds = [n * i // count for i in range(count + 1)]
    out = torch.mm(a[:, : bounds[1]], b[: bounds[1]])
    for begin, end in zip(bounds[1:-1], bounds[2:], strict=True):
        out.addmm_(a[:, begin:end], b[begin:end])
    return out
