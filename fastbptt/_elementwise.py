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


def _named(*names: str) -> Callable[[Callable], Callable]:
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

    _named(name, *aliases)(function)


for _name in ("neg", "sqrt", "exp", "expm1", "log", "log1p", "tanh", "sigmoid", "erf"):
    _unary(_name)
for _names in (("sin",), ("cos",), ("abs", "absolute")):
    _unary(*_names)
FUNCTIONS["negative"] = FUNCTIONS["neg"]
FUNCTIONS["special_expit"] = FUNCTIONS["sigmoid"]
FUNCTIONS["special_erf"] = FUNCTIONS["erf"]


@_named("add")
def _add(input: Number, other: Number, *, alpha: float = 1) -> Value:
    return _op("add", input, other if alpha == 1 else _mul(other, alpha))


@_named("sub", "subtract")
def _sub(input: Number, other: Number, *, alpha: float = 1) -> Value:
    return _op("sub", input, other if alpha == 1 else _mul(other, alpha))


@_named("rsub")
def _rsub(input: Number, other: Number) -> Value:
    return _op("sub", other, input)


@_named("mul", "multiply", "rmul")
def _mul(input: Number, other: Number) -> Value:
    return _op("mul", input, other)


@_named("div", "divide", "true_divide", "truediv")
def _div(input: Number, other: Number, *, rounding_mode: None = None) -> Value:
    if rounding_mode is not None:
        raise ValueError(f"rounding_mode={rounding_mode!r}")
    return _op("div", input, other)


@_named("rtruediv", "rdiv")
def _rdiv(input: Number, other: Number) -> Value:
    return _op("div", other, input)


FUNCTIONS["radd"] = _add


@_named("reciprocal")
def _reciprocal(input: Number) -> Value:
    return _div(1.0, input)


@_named("rsqrt")
def _rsqrt(input: Number) -> Value:
    return _div(1.0, _op("sqrt", input))


@_named("square")
def _square(input: Number) -> Value:
    return _mul(input, input)


@_named("pow", "float_power")
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


@_named("rpow")
def _rpow(input: Number, other: Number) -> Number:
    return _pow(other, input)


@_named("exp2", "special_exp2")
def _exp2(input: Number) -> Value:
    return _op("exp", _mul(input, math.log(2)))


@_named("log2")
def _log2(input: Number) -> Value:
    return _mul(_op("log", input), 1 / math.log(2))


@_named("log10")
def _log10(input: Number) -> Value:
    return _mul(_op("log", input), 1 / math.log(10))


@_named("lerp")
def _lerp(input: Number, end: Number, weight: Number) -> Value:
    return _add(input, _mul(weight, _sub(end, input)))


@_named("addcmul")
def _addcmul(input: Number, tensor1: Number, tensor2: Number, *, value: float = 1) -> Value:
    return _add(input, _mul(tensor1, tensor2), alpha=value)


@_named("addcdiv")
def _addcdiv(input: Number, tensor1: Number, tensor2: Number, *, value: float = 1) -> Value:
    return _add(input, _div(tensor1, tensor2), alpha=value)


@_named("maximum")
def _maximum(input: Number, other: Number) -> Value:
    return _op("maximum", input, other)


@_named("minimum")
def _minimum(input: Number, other: Number) -> Value:
    return _op("minimum", input, other)


@_named("max")
def _max(input: Value, other: Value) -> Value:
    _refuse_dimension(other)
    return _op("maximum", input, other)


@_named("min")
def _min(input: Value, other: Value) -> Value:
    _refuse_dimension(other)
    return _op("minimum", input, other)


# Comparisons and what is made of them. `negated` is a mark on the value, no operation.


@_named("lt", "less")
def _lt(input: Number, other: Number) -> Value:
    return _op("lt", input, other)


@_named("le", "less_equal")
def _le(input: Number, other: Number) -> Value:
    return _op("le", input, other)


@_named("gt", "greater")
def _gt(input: Number, other: Number) -> Value:
    return _op("lt", other, input)


@_named("ge", "greater_equal")
def _ge(input: Number, other: Number) -> Value:
    return _op("le", other, input)


@_named("eq")
def _eq(input: Number, other: Number) -> Value:
    return _op("eq", input, other)


@_named("ne", "not_equal")
def _ne(input: Number, other: Number) -> Value:
    return _op("eq", input, other).inverted()


@_named("logical_not", "bitwise_not", "invert")
def _not(input: Value) -> Value:
    return _truth(input).inverted()


@_named("logical_and", "bitwise_and", "and", "rand")
def _and(input: Value, other: Value) -> Value:
    return _eq(_where(_truth(input), _number(_truth(other)), 0.0), 1.0)


@_named("logical_or", "bitwise_or", "or", "ror")
def _or(input: Value, other: Value) -> Value:
    return _eq(_where(_truth(input), 1.0, _number(_truth(other))), 1.0)


@_named("where")
def _where(condition: Value, input: Number, other: Number) -> Value:
    if isinstance(condition, float | int) or not condition.is_truth:
        raise ValueError("a condition that is no comparison")
    if condition.is_negated:
        condition, input, other = condition.inverted(), other, input
    recorder = condition._recorder
    return recorder.record("where", condition, _number(input), _number(other))


@_named("masked_fill")
def _masked_fill(input: Number, mask: Value, value: Number) -> Value:
    return _where(mask, value, input)


def _truth(value: Value) -> Value:
    return value if value.is_truth else _ne(value, 0.0)


def _number(value: Number) -> Number:
    is_truth = not isinstance(value, float | int) and value.is_truth
    return _where(value, 1.0, 0.0) if is_truth else value


@_named("float", "double")
def _as_number(input: Value) -> Number:
    if not input.is_truth:
        raise ValueError("another dtype than the states'")
    return _number(input)


@_named("type_as")
def _type_as(input: Value, other: Value) -> Number:
    return _number(input)


@_named("zeros_like")
def _zeros_like(input: Value) -> Value:
    return input._recorder.constant(0.0)


@_named("ones_like")
def _ones_like(input: Value) -> Value:
    return input._recorder.constant(1.0)


@_named("full_like")
def _full_like(input: Value, fill_value: float) -> Value:
    return input._recorder.constant(float(fill_value))


# Functions in pieces. Where an unused piece could overflow its argument is put at the boundary, so
# that no infinity gets into a derivative.


@_named("relu")
def _relu(input: Number, inplace: bool = False) -> Value:
    _refuse_inplace(inplace)
    return _where(_le(input, 0.0), 0.0, input)


@_named("sign", "sgn")
def _sign(input: Number) -> Value:
    return _where(_lt(0.0, input), 1.0, _where(_lt(input, 0.0), -1.0, 0.0))


@_named("leaky_relu")
def _leaky_relu(input: Number, negative_slope: float = 0.01, inplace: bool = False) -> Value:
    _refuse_inplace(inplace)
    return _where(_lt(0.0, input), input, _mul(input, negative_slope))


@_named("elu")
def _elu(input: Number, alpha: float = 1.0, inplace: bool = False) -> Value:
    _refuse_inplace(inplace)
    return _exponential_linear(input, alpha, 1.0, 1.0)


@_named("celu")
def _celu(input: Number, alpha: float = 1.0, inplace: bool = False) -> Value:
    _refuse_inplace(inplace)
    return _exponential_linear(input, alpha, 1.0, 1 / alpha)


@_named("selu")
def _selu(input: Number, inplace: bool = False) -> Value:
    _refuse_inplace(inplace)
    return _exponential_linear(input, 1.6732632423543772848, 1.0507009873554804934, 1.0)


def _exponential_linear(input: Number, alpha: float, scale: float, input_scale: float) -> Value:
    is_positive = _lt(0.0, input)
    below = _op("expm1", _mul(_where(is_positive, 0.0, input), input_scale))
    return _where(is_positive, _mul(input, scale), _mul(below, alpha * scale))


@_named("clamp", "clip")
def _clamp(input: Number, min: float | None = None, max: float | None = None) -> Number:
    for bound in (min, max):
        if bound is not None and not isinstance(bound, float | int):
            raise ValueError("a bound that is no constant; use torch.maximum and torch.minimum")
    if min is not None:
        input = _where(_lt(input, min), min, input)
    return input if max is None else _where(_lt(max, input), max, input)


@_named("hardtanh")
def _hardtanh(
    input: Number, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Value:
    _refuse_inplace(inplace)
    below = _where(_le(max_val, input), max_val, input)
    return _where(_le(input, min_val), min_val, below)


@_named("relu6")
def _relu6(input: Number, inplace: bool = False) -> Value:
    return _hardtanh(input, 0.0, 6.0, inplace)


@_named("hardsigmoid")
def _hardsigmoid(input: Number, inplace: bool = False) -> Value:
    return _div(_hardtanh(_add(input, 3.0), 0.0, 6.0, inplace), 6.0)


@_named("softplus")
def _softplus(input: Number, beta: float = 1.0, threshold: float = 20.0) -> Value:
    scaled = input if beta == 1 else _mul(input, beta)
    is_linear = _lt(threshold, scaled)
    curve = _op("log1p", _op("exp", _where(is_linear, threshold, scaled)))
    return _where(is_linear, input, curve if beta == 1 else _div(curve, beta))


@_named("logsigmoid", "log_sigmoid")
def _logsigmoid(input: Number) -> Value:
    curve = _op("log1p", _op("exp", _op("neg", _op("abs", input))))
    return _sub(_minimum(input, 0.0), curve)


@_named("softsign")
def _softsign(input: Number) -> Value:
    return _div(input, _add(_op("abs", input), 1.0))


@_named("tanhshrink")
def _tanhshrink(input: Number) -> Value:
    return _sub(input, _op("tanh", input))


@_named("silu")
def _silu(input: Number, inplace: bool = False) -> Value:
    _refuse_inplace(inplace)
    return _mul(input, _op("sigmoid", input))


@_named("mish")
def _mish(input: Number, inplace: bool = False) -> Value:
    _refuse_inplace(inplace)
    return _mul(input, _op("tanh", _softplus(input)))


@_named("gelu")
def _gelu(input: Number, approximate: str = "none") -> Value:
    if approximate == "none":
        return _mul(_mul(input, 0.5), _add(_op("erf", _mul(input, math.sqrt(0.5))), 1.0))
    inner = _add(input, _mul(_pow(input, 3), 0.044715))
    return _mul(_mul(input, 0.5), _add(_op("tanh", _mul(inner, math.sqrt(2 / math.pi))), 1.0))


def _refuse_dimension(other: Number) -> None:
    if isinstance(other, float | int):
        raise ValueError("a number, which is a dimension")


def _refuse_inplace(inplace: bool) -> None:
    if inplace:
        raise ValueError("inplace=True, which changes a value in place")


def takes(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether the function of that name takes such arguments: not if it is another overload."""
    try:
        inspect.signature(FUNCTIONS[name]).bind(*args, **kwargs)
    except TypeError:
        return False
    return True
