"""Traces a cell's function: called once with symbolic values, it leaves the list of what it did.

A value stands for one number of one unit. torch's functions come to it by ``__torch_function__``,
operators and methods directly; what is not elementwise has no meaning for it, and is an error that
names the line of the function.
"""

from __future__ import annotations

import numbers
import os
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from fastbptt import _activations as _activations  # which puts them among the functions
from fastbptt import _elementwise
from fastbptt._program import EVALUATE, Leaf, Op, Program, Ref

__all__ = ["Leaf", "Op", "Program", "Ref", "trace"]

_OWN = (
    "_activations",
    "_elementwise",
    "_trace",
    "normalization",
)  # modules whose lines no error names
_RANDOM = {
    *("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm"),
    *("bernoulli", "bernoulli_", "dropout", "feature_dropout", "alpha_dropout", "normal"),
    *("normal_", "uniform_", "poisson", "multinomial", "exponential_", "rrelu", "binomial"),
    *("feature_alpha_dropout", "gumbel_softmax", "cauchy_", "geometric_", "log_normal_"),
}
_HERE = {os.path.join(os.path.dirname(__file__), f"{name}.py") for name in _OWN}
_TORCH = os.path.dirname(torch.__file__) + os.sep
_TRUTHS = ("lt", "le", "eq")


def _line() -> str:
    """Where the function is: the innermost line that is neither torch's nor of this module."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file not in _HERE and not file.startswith((_TORCH, "<string>")):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"


def _refuse(what: str) -> NoReturn:
    raise TypeError(f"a cell's function must be elementwise, got {what} at {_line()}")


def _refuse_control() -> NoReturn:
    raise TypeError(
        "a cell's function must not choose by data (if, while, and, or, a Python number made of a "
        f"value), since it is traced once; use torch.where: got it at {_line()}"
    )


class _Recorder:
    """The operations so far. An operation that is there already gives the value that it gave."""

    def __init__(self, leaves: Sequence[Leaf]):
        self.leaves = tuple(leaves)
        self.ops: list[Op] = []
        self._known: dict[tuple, int] = {}
        self.values = [Value(self, Ref(i)) for i in range(len(leaves))]

    def constant(self, number: float) -> Value:
        return Value(self, number)

    def record(self, name: str, *args: Value | float) -> Value:
        given = tuple(self.argument(arg) for arg in args)
        is_truth = name in _TRUTHS
        if not any(isinstance(arg, Ref) for arg in given):
            numbers = (torch.tensor(arg, dtype=torch.float64) for arg in given)
            result = EVALUATE[name](*numbers).item()
            if not is_truth:
                return Value(self, result)
            given = (float(result), 1.0)  # a truth value all the same
            name = "eq"
        # As text, since 0.0 == -0.0.
        key = (name, *map(repr, given))
        if key not in self._known:
            self._known[key] = len(self.leaves) + len(self.ops)
            self.ops.append(Op(name, given))
        return Value(self, Ref(self._known[key]), is_truth)

    def argument(self, value: Value | float) -> Ref | float:
        if isinstance(value, Value):
            if value._recorder is not self:
                _refuse("a value that another call of it had")
            return value._what
        return float(value)

    def program(self, results: Sequence[Ref | float]) -> Program:
        """Of the operations that the results need, numbered anew."""
        first = len(self.leaves)
        needed = {r.index for r in results if isinstance(r, Ref)}
        for i in reversed(range(len(self.ops))):
            if first + i in needed:
                needed |= {arg.index for arg in self.ops[i].args if isinstance(arg, Ref)}
        numbers = dict(zip(range(first), range(first), strict=True))
        for i in range(len(self.ops)):
            if first + i in needed:
                numbers[first + i] = len(numbers)

        def new(args: Sequence[Ref | float]) -> tuple[Ref | float, ...]:
            return tuple(Ref(numbers[a.index]) if isinstance(a, Ref) else a for a in args)

        kept = [op for i, op in enumerate(self.ops) if first + i in needed]
        return Program(self.leaves, tuple(Op(op.name, new(op.args)) for op in kept), new(results))


def _plain_name(function: Callable) -> str:
    """A torch function's name as the table has it: ``Tensor.__radd__`` is radd."""
    name = getattr(function, "__name__", None) or resolve_name(function) or repr(function)
    if name == "__get__":  # a property, whose name is its descriptor's
        return resolve_name(function).split(".")[-2]
    return name.strip("_") if name.startswith("__") else name


def _apply(name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    if name in _RANDOM:
        _refuse_random(name)
    if name not in _elementwise.FUNCTIONS:
        if name == "layer_norm":
            _refuse("layer_norm, which for a cell is fastbptt.layer_norm,")
        if name.endswith("_"):
            _refuse(f"{name}, which changes a value in place,")
        _refuse(f"{name}, which is not in the list of operations,")
    args = tuple(_constant(name, arg) for arg in args)
    kwargs = {key: _constant(name, arg) for key, arg in kwargs.items()}
    if not _elementwise.takes(name, args, kwargs):
        _refuse(f"{name} with other arguments than its elementwise form takes")
    try:
        return _elementwise.FUNCTIONS[name](*args, **kwargs)
    except ValueError as error:
        _refuse(f"{name} with {error}")


def _refuse_random(name: str) -> NoReturn:
    raise TypeError(
        "a cell's function must not be random, since it is traced once; draw outside and pass the "
        f"draw as an argument, an input per step: got {name} at {_line()}"
    )


def _constant(name: str, arg: object) -> object:
    """An argument as the table takes it: tensors of one number are numbers."""
    if not isinstance(arg, Tensor):
        return float(arg) if isinstance(arg, numbers.Real) and not isinstance(arg, int) else arg
    if arg.dim() > 0 or arg.requires_grad:
        asks = " that requires a gradient" if arg.requires_grad else ""
        _refuse(
            f"{name} with a tensor of shape {tuple(arg.shape)}{asks} that is no argument of the "
            "function"
        )
    return float(arg)


def _operator(name: str) -> Callable:
    def method(self: Value, *args: object) -> Any:
        return _apply(name, (self, *args), {})

    return method


class Value:
    """One number of one unit, or a comparison's truth value; part of one trace."""

    __hash__ = object.__hash__
    __array_ufunc__ = None

    def __init__(
        self,
        recorder: _Recorder,
        what: Ref | float,
        is_truth: bool = False,
        is_negated: bool = False,
    ):
        self._recorder = recorder
        self._what = what
        self.is_truth = is_truth
        self.is_negated = is_negated

    def inverted(self) -> Value:
        return Value(self._recorder, self._what, True, not self.is_negated)

    def __repr__(self) -> str:
        return "<a cell's value>"

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _apply(_plain_name(function), args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _RANDOM:
            _refuse_random(name)
        if name not in _elementwise.FUNCTIONS:
            kind = "changes a value in place" if name.endswith("_") else "is not in the list"
            _refuse(f"a value's {name}, which {kind},")
        return lambda *args, **kwargs: _apply(name, (self, *args), kwargs)

    def where(self, condition: object, other: object) -> Value:
        return _apply("where", (condition, self, other), {})

    def __array__(self, *args: object, **kwargs: object) -> NoReturn:
        _refuse("NumPy, which")

    def __bool__(self) -> NoReturn:
        _refuse_control()

    __int__ = __float__ = __index__ = __complex__ = __bool__

    def __getitem__(self, index: object) -> NoReturn:
        _refuse("indexing, which takes a part of a value,")

    def __setitem__(self, index: object, value: object) -> NoReturn:
        _refuse("indexing, which changes a value in place,")

    def __iter__(self) -> NoReturn:
        _refuse("a loop over a value")

    def __len__(self) -> NoReturn:
        _refuse("len of a value")

    def __matmul__(self, other: object) -> NoReturn:
        _refuse("matmul, which is no operation on one unit,")

    __rmatmul__ = __matmul__

    def _in_place(self, other: object) -> NoReturn:
        _refuse("an operator such as +=, which changes a tensor in place,")

    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ipow__ = _in_place
    __iand__ = __ior__ = _in_place

    def __abs__(self) -> Value:
        return _apply("abs", (self,), {})

    def __neg__(self) -> Value:
        return _apply("neg", (self,), {})

    def __pos__(self) -> Value:
        return self

    def __invert__(self) -> Value:
        return _apply("invert", (self,), {})


_OPERATORS = ("add", "sub", "mul", "truediv", "pow", "and", "or")
for _name in (*_OPERATORS, *("r" + name for name in _OPERATORS), *("lt", "le", "gt", "ge")):
    setattr(Value, f"__{_name}__", _operator(_name))
for _name in ("eq", "ne"):
    setattr(Value, f"__{_name}__", _operator(_name))
for _name in ("floordiv", "mod", "xor", "divmod"):
    setattr(Value, f"__{_name}__", _operator(_name))
    setattr(Value, f"__r{_name}__", _operator(_name))


class _NoDraws(TorchFunctionMode):
    """Refuses random functions of torch that are given no value, such as ``torch.rand(())``."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = _plain_name(function)
        if name in _RANDOM:
            _refuse_random(name)
        return function(*args, **(kwargs or {}))


def trace(
    function: Callable,
    gates: int,
    states: int,
    extras: Sequence[str],
    per_gate: Sequence[str] = (),
) -> Program:
    """The program of a cell's function.

    Args:
        function: (pre, rec, state, *extras) -> the new states, a tuple; ``pre`` and ``rec`` are
            tuples of one value for each gate, ``state`` of one for each state.
        gates, states: how many, at least 1.
        extras: the names of the function's other arguments, in its order.
        per_gate: those of them that are tuples of one value for each gate.

    Raises:
        TypeError: the function is not elementwise, has an operation that is not in the list,
            chooses by data, is random, or returns something else than values; the message names
            the operation and the line.
        ValueError: it returns another number of states.
    """
    first = _trace_once(function, gates, states, extras, per_gate)
    if str(_trace_once(function, gates, states, extras, per_gate)) != str(first):
        raise TypeError(
            f"a cell's function must do the same in each call, got another program in a second "
            f"call of {function.__name__}: does it draw a random number, or count?"
        )
    return first


def _trace_once(
    function: Callable, gates: int, states: int, extras: Sequence[str], per_gate: Sequence[str]
) -> Program:
    leaves = [Leaf("pre", g) for g in range(gates)] + [Leaf("rec", g) for g in range(gates)]
    leaves += [Leaf("state", s) for s in range(states)]
    names = {e: [f"{e}[{g}]" for g in range(gates)] if e in per_gate else [e] for e in extras}
    leaves += [Leaf("extra", name) for of_extra in names.values() for name in of_extra]
    recorder = _Recorder(leaves)
    values = recorder.values
    rest = 2 * gates + states
    others = iter(values[rest:])
    given = {e: tuple(islice(others, len(own))) for e, own in names.items()}
    with _NoDraws():
        results = function(
            tuple(values[:gates]),
            tuple(values[gates : 2 * gates]),
            tuple(values[2 * gates : rest]),
            **{e: own if e in per_gate else own[0] for e, own in given.items()},
        )
    code = function.__code__
    place = f"{function.__name__} at {code.co_filename}:{code.co_firstlineno}"
    if not isinstance(results, tuple | list):
        raise TypeError(
            f"a cell's function must return its new states as a tuple of {states}, got "
            f"{type(results).__name__} from {place}"
        )
    if len(results) != states:
        raise ValueError(
            f"a cell's function must return {states} new states (states={states}), got "
            f"{len(results)} from {place}"
        )
    return recorder.program([_result(recorder, i, r, place) for i, r in enumerate(results)])


def _result(recorder: _Recorder, number: int, result: object, place: str) -> Ref | float:
    if isinstance(result, Value):
        return recorder.argument(_elementwise._number(result))
    is_number = isinstance(result, float | int)
    if is_number or isinstance(result, Tensor) and result.dim() == 0 and not result.requires_grad:
        return float(result)
    got = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else None
    raise TypeError(
        f"new state {number} must be a value that the function made of its arguments, got "
        f"{got or repr(result)} from {place}"
    )
