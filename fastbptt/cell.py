"""``fastbptt.cell``: a recurrent cell made of an elementwise function of one unit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastbptt import _trace
from fastbptt._program import Program
from fastbptt.truncation import _as_int, _positive_int

__all__ = ["Cell", "cell"]

# Names that Recurrent's constructor, its calls and its parameters have already.
TAKEN_NAMES = {
    *("self", "cell", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout"),
    *("bidirectional", "device", "dtype", "truncation", "input", "hx", "resets", "return_states"),
    *("reset_to", "clip_grad"),
    *("weight_ih", "weight_hh", "bias_ih", "bias_hh"),
}
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Cell:
    """A recurrent cell, as :func:`cell` makes it; calling it calls the function.

    Attributes:
        function: the definition.
        gates: G, the number of rows of W_ih and W_hh for each unit.
        states: the number of states.
        recurrent: the number of the state that W_hh sees.
        output: the number of the state that is a layer's output.
        extras: the names of the function's arguments beyond the state.
        per_gate: those of them that are tuples of a value for each gate.
        defaults: the numbers that some of them have where they are not given.
        program: the function as a list of operations.
        compiled: what runs a layer of it, by dtype and by instruction set or device, as far as it
            was asked for.
        has_rec: whether the function uses ``rec``; a network whose cell does not has no W_hh.
    """

    def __init__(
        self,
        function: Callable,
        gates: int,
        states: int,
        recurrent: int,
        output: int,
        per_gate: Sequence[str],
    ):
        self.gates = _positive_int("gates", gates)
        self.states = _positive_int("states", states)
        self.recurrent = _state_number("recurrent", recurrent, self.states)
        self.output = _state_number("output", output, self.states)
        if not inspect.isfunction(function):
            raise TypeError(f"a cell must be made of a function, got {type(function).__name__}")
        self.function = function
        self.extras, self.defaults = _arguments(function)
        self.per_gate = _names("per_gate", per_gate, self.extras)
        self.program: Program = _trace.trace(
            function, self.gates, self.states, self.extras, self.per_gate
        )
        self.has_rec = self.program.uses("rec")
        self.compiled: dict = {}
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(self, name, getattr(function, name))
        self.__wrapped__ = function

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Calls the function."""
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<fastbptt.cell {self.__name__}, gates={self.gates}, states={self.states}>"

    def __reduce__(self) -> str:
        return self.__qualname__  # as functions are: by where it stands

    def step(
        self,
        extras: Sequence[str],
        x: Tensor,
        states: tuple[Tensor, ...],
        weight_ih: Tensor,
        weight_hh: Tensor | None,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        *values: Tensor,
    ) -> tuple[Tensor, ...]:
        """One step of a layer, x [B, I] and states [B, H] -> the new states, of the same dtypes.

        pre = W_ih x + b_ih, rec = W_hh s + b_hh with s the state number ``recurrent``, and then
        the function; ``values`` are the arguments ``extras``, by that order.
        """
        pre = torch.nn.functional.linear(x, weight_ih, bias_ih)
        if weight_hh is None:
            rec = torch.zeros_like(pre)
        else:
            rec = torch.nn.functional.linear(states[self.recurrent], weight_hh, bias_hh)
        given = dict(zip(extras, values, strict=True))
        for name in self.per_gate:
            of_all = given[name]
            given[name] = of_all.unbind(0) if of_all.dim() else (of_all,) * self.gates
        results = self.function(
            pre.chunk(self.gates, -1), rec.chunk(self.gates, -1), states, **given
        )
        return tuple(
            new.to(old.dtype).expand_as(old)
            if isinstance(new, Tensor)
            else torch.full_like(old, new)
            for new, old in zip(results, states, strict=True)
        )


def cell(
    *, gates: int, states: int, recurrent: int = 0, output: int = 0, per_gate: Sequence[str] = ()
) -> Callable[[Callable], Cell]:
    """Makes a recurrent cell of a function that says what one step does to one unit.

        @fastbptt.cell(gates=1, states=1)
        def leaky(pre, rec, state, alpha):
            (h,) = state
            return (h + alpha * (torch.tanh(pre[0] + rec[0]) - h),)

        net = fastbptt.Recurrent(leaky, input_size, hidden_size, alpha=0.1)

    The function takes ``pre`` and ``rec``, tuples with a value for each gate, W_ih x + b_ih and
    W_hh h + b_hh; ``state``, a tuple with a value for each state; and arguments of its own, which
    :class:`Recurrent` is given by their names. It returns the new states, a tuple. Called by the
    loops its values are tensors; when it is defined it is called twice with symbols, so that it can
    only be elementwise: operators, torch's elementwise functions (``torch.where`` for a choice) and
    constants; and :func:`fastbptt.layer_norm`, the one operation over all units of a layer.

    Args:
        gates: G; W_ih is [G*H, I] and W_hh [G*H, H], gate g of unit u in row g*H + u.
        states: how many states a unit has.
        recurrent: the number of the state that W_hh sees.
        output: the number of the state that is a layer's output.
        per_gate: the names of those arguments of its own that are tuples with a value for each
            gate, as ``pre`` and ``rec`` are.

    Raises:
        TypeError: a number is no int; ``per_gate`` is no sequence of arguments' names; the function
            is none, has an argument that a network has already or that cannot be given by its name,
            is not elementwise, has an operation that is not in the list, chooses by data, or is
            random. The message says what, and the line.
        ValueError: ``gates`` or ``states`` is less than 1, ``recurrent`` or ``output`` is no
            state's number, or the function returns another number of states.
    """

    def made(function: Callable) -> Cell:
        return Cell(function, gates, states, recurrent, output, per_gate)

    return made


def _state_number(name: str, value: object, states: int) -> int:
    number = _as_int(value)
    if number is None:
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if not 0 <= number < states:
        raise ValueError(f"{name} must be a state's number, 0 to {states - 1}, got {number}")
    return number


def _names(name: str, value: object, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(value) if isinstance(value, tuple | list) else (value,)
    if isinstance(value, tuple | list) and all(each in known for each in names):
        return names
    has = ", ".join(known) or "none"
    raise TypeError(
        f"{name} must be a tuple of names of the function's arguments beyond the state ({has}), "
        f"got {value!r}"
    )


def _arguments(function: Callable) -> tuple[tuple[str, ...], dict[str, float]]:
    """The names of the arguments beyond the state, and the numbers that are their defaults."""
    first, rest = [], []
    for parameter in inspect.signature(function).parameters.values():
        (first if len(first) < 3 else rest).append(parameter)
    if len(first) < 3 or any(parameter.kind not in _POSITIONAL for parameter in first):
        raise TypeError(
            "a cell's function must take pre, rec and state by position, got "
            f"{function.__name__}{inspect.signature(function)}"
        )
    for parameter in rest:
        if parameter.kind not in _BY_NAME:
            raise TypeError(
                "a cell's function must take its arguments beyond the state by name, got "
                f"{parameter} in {function.__name__}"
            )
        if parameter.name in TAKEN_NAMES:
            raise TypeError(
                f"a cell's argument must have a name that fastbptt.Recurrent has not, got "
                f"{parameter.name!r} twice, in {function.__name__} and there"
            )
    given = {p.name: p.default for p in rest if p.default is not inspect.Parameter.empty}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, float | int):
            raise TypeError(f"the default of {name} must be a number, got {value!r}")
    return tuple(p.name for p in rest), {name: float(value) for name, value in given.items()}
