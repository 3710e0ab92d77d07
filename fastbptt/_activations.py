"""torch's activations and functions in pieces, made of those in ``_elementwise``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastbptt._elementwise import (
    Number,
    _add,
    _div,
    _le,
    _lt,
    _minimum,
    _mul,
    _op,
    _pow,
    _sub,
    _where,
    named,
)

if TYPE_CHECKING:
    from fastbptt._trace import Value

# Of those in pieces: where an unused piece could overflow its argument is put at the boundary, so
# that no infinity gets into a derivative.


@named("relu")
def _relu(input: Number, inplace: bool = False) -> Value:
    _refuse_inplace(inplace)
    return _where(_le(input, 0.0), 0.0, input)


@named("sign", "sgn")
def _sign(input: Number) -> Value:
    return _where(_lt(0.0, input), 1.0, _where(_lt(input, 0.0), -1.0, 0.0))


@named("leaky_relu")
def _leaky_relu(input: Number, negative_slope: float = 0.01, inplace: bool = False) -> Value:
    _refuse_inplace(inplace)
    return _where(_lt(0.0, input), input, _mul(input, negative_slope))


@named("elu")
def _elu(input: Number, alpha: float = 1.0, inplace: bool = False) -> Value:
    _refuse_inplace(inplace)
    return _exponential_linear(input, alpha, 1.0, 1.0)


@named("celu")
def _celu(input: Number, alpha: float = 1.0, inplace: bool = False) -> Value:
    _refuse_inplace(inplace)
    return _exponential_linear(input, alpha, 1.0, 1 / alpha)


@named("selu")
def _selu(input: Number, inplace: bool = False) -> Value:
    _refuse_inplace(inplace)
    return _exponential_linear(input, 1.6732632423543772848, 1.0507009873554804934, 1.0)


def _exponential_linear(input: Number, alpha: float, scale: float, input_scale: float) -> Value:
    is_positive = _lt(0.0, input)
    below = _op("expm1", _mul(_where(is_positive, 0.0, input), input_scale))
    return _where(is_positive, _mul(input, scale), _mul(below, alpha * scale))


@named("clamp", "clip")
def _clamp(input: Number, min: float | None = None, max: float | None = None) -> Number:
    for bound in (min, max):
        if bound is not None and not isinstance(bound, float | int):
            raise ValueError("a bound that is no constant; use torch.maximum and torch.minimum")
    if min is not None:
        input = _where(_lt(input, min), min, input)
    return input if max is None else _where(_lt(max, input), max, input)


@named("hardtanh")
def _hardtanh(
    input: Number, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Value:
    _refuse_inplace(inplace)
    below = _where(_le(max_val, input), max_val, input)
    return _where(_le(input, min_val), min_val, below)


@named("relu6")
def _relu6(input: Number, inplace: bool = False) -> Value:
    return _hardtanh(input, 0.0, 6.0, inplace)


@named("hardsigmoid")
def _hardsigmoid(input: Number, inplace: bool = False) -> Value:
    return _div(_hardtanh(_add(input, 3.0), 0.0, 6.0, inplace), 6.0)


@named("softplus")
def _softplus(input: Number, beta: float = 1.0, threshold: float = 20.0) -> Value:
    scaled = input if beta == 1 else _mul(input, beta)
    is_linear = _lt(threshold, scaled)
    curve = _op("log1p", _op("exp", _where(is_linear, threshold, scaled)))
    return _where(is_linear, input, curve if beta == 1 else _div(curve, beta))


@named("logsigmoid", "log_sigmoid")
def _logsigmoid(input: Number) -> Value:
    curve = _op("log1p", _op("exp", _op("neg", _op("abs", input))))
    return _sub(_minimum(input, 0.0), curve)


@named("softsign")
def _softsign(input: Number) -> Value:
    return _div(input, _add(_op("abs", input), 1.0))


@named("tanhshrink")
def _tanhshrink(input: Number) -> Value:
    return _sub(input, _op("tanh", input))


@named("silu")
def _silu(input: Number, inplace: bool = False) -> Value:
    _refuse_inplace(inplace)
    return _mul(input, _op("sigmoid", input))


@named("mish")
def _mish(input: Number, inplace: bool = False) -> Value:
    _refuse_inplace(inplace)
    return _mul(input, _op("tanh", _softplus(input)))


@named("gelu")
def _gelu(input: Number, approximate: str = "none") -> Value:
    if approximate == "none":
        return _mul(_mul(input, 0.5), _add(_op("erf", _mul(input, math.sqrt(0.5))), 1.0))
    inner = _add(input, _mul(_pow(input, 3), 0.044715))
    return _mul(_mul(input, 0.5), _add(_op("tanh", _mul(inner, math.sqrt(2 / math.pi))), 1.0))


def _refuse_inplace(inplace: bool) -> None:
    if inplace:
        raise ValueError("inplace=True, which changes a value in place")
