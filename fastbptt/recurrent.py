"""``fastbptt.Recurrent``: a network of any cell that is made of a function."""

from __future__ import annotations

import functools
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from fastbptt import ops
from fastbptt._cell_network import Layers, run_layers
from fastbptt._options import as_clip_grad, options_of, sizes_of
from fastbptt.call import Call, call_of_module
from fastbptt.cell import TAKEN_NAMES, Cell
from fastbptt.nn import _NOT_GIVEN, defaults
from fastbptt.truncation import Truncation, _positive_int, as_truncation

__all__ = ["Recurrent"]

_PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
PerStepInput = Tensor | PackedSequence | float


# Of no dimension, so that it changes no dtype. Made once: it takes longer than a short pass.
@functools.lru_cache(maxsize=1024)
def _kept_number(text: str, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(float(text), dtype=dtype, device="cpu")


def _number(value: float, input: Tensor, dtype: torch.dtype) -> Tensor:
    """A number as a tensor of the CPU's: one for all calls where nobody looks at operators."""
    if ops.is_watched(input) or torch._C._len_torch_dispatch_stack() > 0:
        return torch.tensor(float(value), dtype=dtype, device="cpu")
    return _kept_number(repr(float(value)), dtype)  # as text: 0.0 and -0.0 are equal


class Recurrent(torch.nn.Module):
    """A stack of recurrent layers, in one or two directions, whose cell is given.

    Args:
        cell: what :func:`fastbptt.cell` made of a function.
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype: as for ``torch.nn.GRU``, in the same order.
        truncation: where backward passes are cut: None (full), an int k (short for
            ``Chunked(k)``), or a truncation object. Outputs do not depend on it.
        clip_grad: bounds the gradient that passes from a step to the one before, as for
            :class:`fastbptt.RNN`.
        **extras: each argument of the cell's function beyond the state, by its name:

            - a number;
            - a Parameter or Tensor [H], a value for each unit: each layer and direction gets a
              parameter of its own, ``alpha_l0`` and so on, a copy that asks for gradients where
              the given one does ([G, H] for an argument with a value for each gate, which can only
              be such a tensor or a number);
            - a string: the name by which each call is given an input per step;
            - something to draw it from in each call, as :class:`fastbptt.cells.Bernoulli`.

    Parameters are ``torch.nn``'s in names and initialisation: ``weight_ih_l0`` [G*H, I],
    ``weight_hh_l0`` [G*H, H], ``bias_ih_l0`` and ``bias_hh_l0`` [G*H], with gate g of unit u in
    row g*H + u, and so on for further layers and the reverse direction. Where the cell's function
    does not use ``rec`` there are no ``weight_hh`` and ``bias_hh``.

    Raises:
        TypeError: ``cell`` is no cell, an argument of it is not given or one is that it has not,
            a size is no int, ``truncation`` is no truncation, or ``clip_grad`` no number.
        ValueError: a size is less than 1, ``dropout`` is not in [0, 1], ``clip_grad`` is not
            positive, or an extra has another shape or a name that a call has already.
    """

    proj_size = 0
    clip_grad: float | None = None  # of a state saved by a class that had none
    check_hidden_size = torch.nn.RNNBase.check_hidden_size

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        truncation: Truncation | int | None = _NOT_GIVEN,
        clip_grad: float | None = None,
        **extras: Any,
    ):
        super().__init__()
        if not isinstance(cell, Cell):
            raise TypeError(
                "cell must be a function decorated with fastbptt.cell, "
                f"got {cell!r} of type {type(cell).__name__}"
            )
        is_number = isinstance(dropout, float | int) and not isinstance(dropout, bool)
        if not is_number or not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a number from 0 to 1, got {dropout!r}")
        self.cell = cell
        self.input_size = _positive_int("input_size", input_size)
        self.hidden_size = _positive_int("hidden_size", hidden_size)
        self.num_layers = _positive_int("num_layers", num_layers)
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.truncation = (
            defaults.truncation if truncation is _NOT_GIVEN else as_truncation(truncation)
        )
        self.clip_grad = as_clip_grad(clip_grad)
        rows = cell.gates * self.hidden_size
        for i, suffix in enumerate(self._suffixes):
            is_first = i < self._directions
            width = self.input_size if is_first else self._directions * self.hidden_size
            columns = {"weight_ih": (width,), "weight_hh": (self.hidden_size,)}
            for name in self._parts:
                empty = torch.empty(rows, *columns.get(name, ()), device=device, dtype=dtype)
                self.register_parameter(name + suffix, torch.nn.Parameter(empty))
        self.reset_parameters()
        self._set_extras(extras)

    def _set_extras(self, extras: dict[str, Any]) -> None:
        cell = self.cell
        for name in extras:
            if name not in cell.extras:
                has = ", ".join(cell.extras) or "none"
                raise TypeError(f"{cell.__name__} has no argument {name!r}; it has {has}")
        self.extras: dict[str, Any] = {}  # numbers, names of inputs per step, what to draw from
        for name in cell.extras:
            if name not in extras and name not in cell.defaults:
                raise TypeError(f"{cell.__name__} needs {name}, which is not given")
            value = extras.get(name, cell.defaults.get(name))
            if isinstance(value, Tensor):
                self._register(name, value)
            elif name in cell.per_gate and not isinstance(value, float | int):
                raise TypeError(
                    f"{name}, which has a value for each gate, must be a number or a Tensor "
                    f"{list(self._shape_of(name))}, got {value!r} of type {type(value).__name__}"
                )
            elif isinstance(value, float | int) and not isinstance(value, bool):
                self.extras[name] = float(value)
            elif isinstance(value, str):
                if value in TAKEN_NAMES or not value.isidentifier():
                    raise ValueError(
                        f"{name} must be the name of an input per step that a call can have, "
                        f"got {value!r}"
                    )
                self.extras[name] = value
            elif callable(getattr(value, "draw", None)):
                self.extras[name] = value
            else:
                raise TypeError(
                    f"{name} must be a number, a Tensor [{self.hidden_size}], the name of an input "
                    f"per step or something to draw from, got {value!r} of type "
                    f"{type(value).__name__}"
                )

    def _shape_of(self, name: str) -> tuple[int, ...]:
        """That of an argument's parameter, if it is one."""
        H = self.hidden_size
        return (self.cell.gates, H) if name in self.cell.per_gate else (H,)

    def _register(self, name: str, value: Tensor) -> None:
        shape = self._shape_of(name)
        if value.shape != shape or not value.is_floating_point():
            what = "each gate and unit" if len(shape) > 1 else "each unit"
            raise ValueError(
                f"{name} must be floating point and have shape {shape}, a value for {what}, got "
                f"{value.dtype} and {tuple(value.shape)}"
            )
        for suffix in self._suffixes:
            own = value.detach().to(self.weight_ih_l0, copy=True)
            own = torch.nn.Parameter(own, requires_grad=value.requires_grad)
            self.register_parameter(name + suffix, own)

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def _suffixes(self) -> list[str]:
        """Of the parameters' names, for each layer and direction."""
        ends = ("", "_reverse")[: self._directions]
        return [f"_l{layer}{end}" for layer in range(self.num_layers) for end in ends]

    @property
    def _parts(self) -> tuple[str, ...]:
        if not self.cell.has_rec:
            return ("weight_ih", "bias_ih") if self.bias else ("weight_ih",)
        return _PARTS if self.bias else _PARTS[:2]

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """For each layer and direction those of w_ih, w_hh, b_ih and b_hh that there are."""
        return [[getattr(self, part + s) for part in self._parts] for s in self._suffixes]

    def _weights(self) -> list[Tensor]:
        return [weight for of_layer in self.all_weights for weight in of_layer]

    def reset_parameters(self) -> None:
        """Draws weights and biases from U(-1/sqrt(H), 1/sqrt(H)), as torch.nn does."""
        bound = 1 / math.sqrt(self.hidden_size)
        for weight in self._weights():
            torch.nn.init.uniform_(weight, -bound, bound)

    def flatten_parameters(self) -> None:
        """Does nothing: there for programs that call it on any recurrent module."""

    def extra_repr(self) -> str:
        """What ``repr`` shows: the cell, what is not as by default, and the extras."""
        text = f"{self.cell.__name__}, {self.input_size}, {self.hidden_size}"
        plain = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0}
        plain |= {"bidirectional": False, "truncation": None, "clip_grad": None}
        for name, default in plain.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        for name in self.cell.extras:
            own = f"<{' x '.join(map(str, self._shape_of(name)))} parameters>"
            text += f", {name}={repr(self.extras[name]) if name in self.extras else own}"
        return text

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | tuple[Tensor, ...] | None = None,
        *,
        truncation: Truncation | int | None = _NOT_GIVEN,
        resets: Tensor | None = None,
        return_states: bool = False,
        reset_to: Tensor | tuple[Tensor, ...] | None = None,
        clip_grad: float | None = _NOT_GIVEN,
        **per_step: PerStepInput,
    ) -> tuple:
        """Runs the network over a sequence.

        Args:
            input: [T, B, I], [B, T, I] with ``batch_first``, [T, I], or a PackedSequence.
            hx: the states before the first step, a tuple with one for each of the cell's states,
                or a Tensor if it has one: [num_layers * directions, B, H] each (without B for an
                unbatched input); zeros if None.
            truncation: where this call's backward pass is cut, instead of the module's setting.
            resets: bool [T, B], [B, T] with ``batch_first``, or [T]; for a packed input [T, B] in
                its original order. Where it is true, all states that enter step t are zeros, in
                every layer, and the gradient is cut.
            return_states: whether to return all states of all steps too.
            reset_to: what the states are at a reset instead of zeros, with gradients; as for
                :class:`fastbptt.RNN`, a tuple with one for each state if there are several.
            clip_grad: bounds the recurrent gradient in this call, instead of the module's setting.
            **per_step: the inputs per step, by the names that the module was made with (and, by
                the argument's name, one in place of what would be drawn): a number; or [T, B, H]
                or [T, B, 1] for all layers and directions alike, or
                [num_layers * directions, T, B, H or 1]. They lie as a padded input of the call
                does ([B, T, H] with ``batch_first``, [T, H] without a batch); for a packed input
                padded, in its original order of sequences, or packed like it.

        Returns:
            output: like ``input``, with H * directions features.
            final states: like ``hx``.
            states, with ``return_states``: as the final states a tuple, or one tensor if the cell
                has one state, of [num_layers * directions, T, B, H] ([num_layers * directions, B,
                T, H] with ``batch_first``; without B for an unbatched input; for a packed input
                [num_layers * directions, N, H] with rows like its data).

        Raises:
            TypeError, ValueError: ``truncation`` is no truncation or does not fit the input;
                ``resets`` is no bool tensor or does not fit; ``reset_to`` does not fit, or goes
                without resets; ``clip_grad`` is no positive number; an input per step is not
                given, not known, or does not fit.
            ValueError, RuntimeError: where torch.nn's modules raise them.
        """
        truncation = self.truncation if truncation is _NOT_GIVEN else as_truncation(truncation)
        clip_grad = self.clip_grad if clip_grad is _NOT_GIVEN else as_clip_grad(clip_grad)
        options = options_of(return_states, reset_to, clip_grad, resets)
        call = call_of_module(self, input, self._as_tuple(hx), truncation, resets, options)
        fixed, inputs = self._values(call, per_step, call.weights[0])
        weights, parts = [], self._parts
        for i, suffix in enumerate(self._suffixes):
            there = dict(zip(parts, call.weights[i * len(parts) :], strict=False))
            own = [there.get(part) for part in _PARTS]
            values = [getattr(self, n + suffix) if v is None else v for n, v in fixed.items()]
            weights.append([*own, *values])
        names = (*fixed, *inputs)
        layers = Layers(
            partial(self.cell.step, names),
            weights,
            (self.hidden_size,) * self.cell.states,
            tuple(inputs.values()),
            self.cell.output,
            self.cell,
            names,
        )
        output, *states = run_layers(call, layers)
        return output, *(each if self.cell.states > 1 else each[0] for each in states)

    @property
    def _cell(self) -> str:
        return self.cell.__name__

    def _as_tuple(self, hx: object) -> tuple[Tensor, ...] | None:
        count = self.cell.states
        if hx is None:
            return None
        if count == 1:
            return (hx,)  # type: ignore[return-value]
        if not isinstance(hx, tuple | list) or len(hx) != count:
            got = f"{len(hx)} of them" if isinstance(hx, tuple | list) else type(hx).__name__
            raise TypeError(
                f"hx must be None or a tuple of {count} Tensors, one for each state of "
                f"{self._cell}, got {got}"
            )
        return tuple(hx)

    def _values(
        self, call: Call, per_step: dict[str, PerStepInput], weight: Tensor
    ) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
        """The function's arguments: those that a layer has (None: a parameter), and per step."""
        fixed: dict[str, Tensor | None] = {}
        inputs: dict[str, Tensor] = {}
        used = set()
        for name in self.cell.extras:
            value = self.extras.get(name)
            draws = value is not None and not isinstance(value, float | str)
            if isinstance(value, str) or (draws and name in per_step):
                keyword = name if draws else value
                if keyword not in per_step:
                    raise TypeError(
                        f"{self._cell} needs an input per step {keyword!r} in each call"
                    )
                used.add(keyword)
                value = per_step[keyword]
            elif draws:
                steps, batch = sizes_of(call)
                shape = (len(self._suffixes), steps, batch, self.hidden_size)
                value = value.draw(shape, weight) if self.training else value.mean
                if isinstance(value, Tensor):
                    inputs[name] = value.movedim(0, 2)
                    continue
            if value is None:
                fixed[name] = None
            elif isinstance(value, float | int) and not isinstance(value, bool):
                fixed[name] = _number(value, call.input, weight.dtype)
            else:
                inputs[name] = self._per_step(name, value, call).to(weight.dtype)
        for keyword in per_step:
            if keyword not in used:
                raise TypeError(f"{self._cell} has no input per step {keyword!r}")
        return fixed, inputs

    def _per_step(self, name: str, value: object, call: Call) -> Tensor:
        """An input per step as [T, B, num_layers * directions, H or 1]."""
        if isinstance(value, PackedSequence):
            if call.packed is None:
                raise ValueError(f"{name} must be a Tensor as input is, got a PackedSequence")
            value, _ = pad_packed_sequence(value, total_length=len(call.packed.batch_sizes))
        elif not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a number, a Tensor or a PackedSequence, got {type(value).__name__}"
            )
        elif self.batch_first and not call.unbatched and value.dim() in (3, 4):
            value = value.transpose(-3, -2)
        if call.unbatched and value.dim() in (2, 3):
            value = value.unsqueeze(-2)
        steps, batch = sizes_of(call)
        count = len(self._suffixes)
        wanted = [(steps, batch, width) for width in (self.hidden_size, 1)]
        if tuple(value.shape) in wanted:
            return value.unsqueeze(2).expand(-1, -1, count, -1)
        if value.dim() == 4 and value.size(0) == count and tuple(value.shape[1:]) in wanted:
            return value.movedim(0, 2)
        raise ValueError(
            f"{name} must have a value for each of {steps} steps, {batch} sequences and "
            f"{self.hidden_size} units (or 1), for all layers and directions alike or with "
            f"{count} of them in front, got shape {tuple(value.shape)} with time first"
        )
