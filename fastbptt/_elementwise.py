"""torch's elementwise functions, written with the operations that kernels know.

Each keeps torch's formula, its derivative where the pieces meet, and what it does with a NaN. The
arguments are a trace's values, or numbers; a function that is not here cannot be in a cell.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from fastbptt._trace import Value

Number: TypeAlias = "Value | float"

# By the names of torch's functions and of a tensor's methods.
FUNCTIONS: dict[str, Callable[..., Any]] = {}


def named(*names: str) -> Callable[[Callable], Callable]:
    def register(function: Callable) -> Callable:
        for name in names:
            FUNCTIONS[name] = function
        return function

    return register


def _op(name: str, *args: Number) -> Value:
    recorder = next(a._recorder for a in args if not isinstance(a, float | int))
    return recorder.record(name, *map(_number, args))


def _unary(name: str, *aliases: str) -> None:
    def function(input: Number) -> Value:
        return _op(name, input)

    named(name, *aliases)(function)


for _name in ("neg", "sqrt", "exp", "expm1", "log", "log1p", "tanh", "sigmoid", "erf"):
    _unary(_name)
for _names in (("sin",), ("cos",), ("abs", "absolute")):
    _unary(*_names)
FUNCTIONS["negative"] = FUNCTIONS["neg"]
FUNCTIONS["special_expit"] = FUNCTIONS["sigmoid"]
FUNCTIONS["special_erf"] = FUNCTIONS["erf"]


@named("add")
def _add(input: Number, other: Number, *, alpha: float = 1) -> Value:
    return _op("add", input, other if alpha == 1 else _mul(other, alpha))


@named("sub", "subtract")
def _sub(input: Number, other: Number, *, alpha: float = 1) -> Value:
    return _op("sub", input, other if alpha == 1 else _mul(other, alpha))


@named("rsub")
def _rsub(input: Number, other: Number) -> Value:
    return _op("sub", other, input)


@named("mul", "multiply", "rmul")
def _mul(input: Number, other: Number) -> Value:
    return _op("mul", input, other)


@named("div", "divide", "true_divide", "truediv")
def _div(input: Number, other: Number, *, rounding_mode: None = None) -> Value:
    if rounding_mode is not None:
        raise ValueError(f"rounding_mode={rounding_mode!r}")
    return _op("div", input, other)


@named("rtruediv", "rdiv")
def _rdiv(input: Number, other: Number) -> Value:
    return _op("div", other, input)


FUNCTIONS["radd"] = _add


@named("reciprocal")
def _reciprocal(input: Number) -> Value:
    return _div(1.0, input)


@named("rsqrt")
def _rsqrt(input: Number) -> Value:
    return _div(1.0, _op("sqrt", input))


@named("square")
def _square(input: Number) -> Value:
    return _mul(input, input)


@named("pow", "float_power")
def _pow(input: Number, exponent: Number) -> Number:
    if not isinstance(exponent, float | int):
        if isinstance(input, float | int) and input > 0:
            return _op("exp", _mul(exponent, math.log(input)))
        raise ValueError("an exponent that is no constant")
    if exponent < 0:
        return _reciprocal(_pow(input, -exponent))
    if exponent == 0:
        return 1.0
    if exponent == 0.5:
        return _op("sqrt", input)
    if exponent == int(exponent) and exponent <= 64:
        half = input if exponent == 1 else _pow(input, int(exponent) // 2)
        if exponent == 1:
            return half
        whole = _mul(half, half)
        return _mul(whole, input) if int(exponent) % 2 else whole
    if exponent == int(exponent):
        raise ValueError(f"an exponent of {exponent}")
    is_zero = _op("eq", input, 0.0)
    power = _op("exp", _mul(_op("log", _where(is_zero, 1.0, input)), exponent))
    return _where(is_zero, 0.0, power)


@named("rpow")
def _rpow(input: Number, other: Number) -> Number:
    return _pow(other, input)


@named("exp2", "special_exp2")
def _exp2(input: Number) -> Value:
    return _op("exp", _mul(input, math.log(2)))


@named("log2")
def _log2(input: Number) -> Value:
    return _mul(_op("log", input), 1 / math.log(2))


@named("log10")
def _log10(input: Number) -> Value:
    return _mul(_op("log", input), 1 / math.log(10))


@named("lerp")
def _lerp(input: Number, end: Number, weight: Number) -> Value:
    return _add(input, _mul(weight, _sub(end, input)))


@named("addcmul")
def _addcmul(input: Number, tensor1: Number, tensor2: Number, *, value: float = 1) -> Value:
    return _add(input, _mul(tensor1, tensor2), alpha=value)


@named("addcdiv")
def _addcdiv(input: Number, tensor1: Number, tensor2: Number, *, value: float = 1) -> Value:
    return _add(input, _div(tensor1, tensor2), alpha=value)


@named("maximum")
def _maximum(input: Number, other: Number) -> Value:
    return _op("maximum", input, other)


@named("minimum")
def _minimum(input: Number, other: Number) -> Value:
    return _op("minimum", input, other)


@named("max")
def _max(input: Value, other: Value) -> Value:
    _refuse_dimension(other)
    return _op("maximum", input, other)


@named("min")
def _min(input: Value, other: Value) -> Value:
    _refuse_dimension(other)
    return _op("minimum", input, other)


# Comparisons and what is made of them. `negated` is a mark on the value, no operation.


@named("lt", "less")
def _lt(input: Number, other: Number) -> Value:
    return _op("lt", input, other)


@named("le", "less_equal")
def _le(input: Number, other: Number) -> Value:
    return _op("le", input, other)


@named("gt", "greater")
def _gt(input: Number, other: Number) -> Value:
    return _op("lt", other, input)


@named("ge", "greater_equal")
def _ge(input: Number, other: Number) -> Value:
    return _op("le", other, input)


@named("eq")
def _eq(input: Number, other: Number) -> Value:
    return _op("eq", input, other)


@named("ne", "not_equal")
def _ne(input: Number, other: Number) -> Value:
    return _op("eq", input, other).inverted()


@named("logical_not", "bitwise_not", "invert")
def _not(input: Value) -> Value:
    return _truth(input).inverted()


@named("logical_and", "bitwise_and", "and", "rand")
def _and(input: Value, other: Value) -> Value:
    return _eq(_where(_truth(input), _number(_truth(other)), 0.0), 1.0)


@named("logical_or", "bitwise_or", "or", "ror")
def _or(input: Value, other: Value) -> Value:
    return _eq(_where(_truth(input), 1.0, _number(_truth(other))), 1.0)


@named("where")
def _where(condition: Value, input: Number, other: Number) -> Value:
    if isinstance(condition, float | int) or not condition.is_truth:
        raise ValueError("a condition that is no comparison")
    if condition.is_negated:
        condition, input, other = condition.inverted(), other, input
    recorder = condition._recorder
    return recorder.record("where", condition, _number(input), _number(other))


@named("masked_fill")
def _masked_fill(input: Number, mask: Value, value: Number) -> Value:
    return _where(mask, value, input)


def _truth(value: Value) -> Value:
    return value if value.is_truth else _ne(value, 0.0)


def _number(value: Number) -> Number:
    is_truth = not isinstance(value, float | int) and value.is_truth
    return _where(value, 1.0, 0.0) if is_truth else value


@named("float", "double")
def _as_number(input: Value) -> Number:
    if not input.is_truth:
        raise ValueError("another dtype than the states'")
    return _number(input)


@named("type_as")
def _type_as(input: Value, other: Value) -> Number:
    return _number(input)


@named("zeros_like")
def _zeros_like(input: Value) -> Value:
    return input._recorder.constant(0.0)


@named("ones_like")
def _ones_like(input: Value) -> Value:
    return input._recorder.constant(1.0)


@named("full_like")
def _full_like(input: Value, fill_value: float) -> Value:
    return input._recorder.constant(float(fill_value))


def _refuse_dimension(other: Number) -> None:
    if isinstance(other, float | int):
        raise ValueError("a number, which is a dimension")


def takes(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether the function of that name takes such arguments: not if it is another overload."""
    try:
        inspect.signature(FUNCTIONS[name]).bind(*args, **kwargs)
    except TypeError:
        return False
    return True
