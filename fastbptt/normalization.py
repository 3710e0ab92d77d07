"""``fastbptt.layer_norm``: what a cell's function may do over all units of a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor

from fastbptt import _elementwise, _trace
from fastbptt._program import normalize

__all__ = ["layer_norm"]

Values = Tensor | Sequence[Tensor]


def layer_norm(
    values: Values,
    weight: Values | float | None = None,
    bias: Values | float | None = None,
    eps: float = 1e-5,
) -> Tensor | tuple[Tensor, ...]:
    """Layer normalization in a cell's function: over all units of a layer, for each sequence.

        normed = (value - mean) / sqrt(variance + eps) * weight + bias

    as ``torch.nn.functional.layer_norm`` of a tensor that has the units of all the values side by
    side: ``layer_norm(rec, gain)`` has one mean and one variance of the G * H numbers that W_hh
    gives, ``tuple(map(layer_norm, rec))`` a mean for each gate.

    Args:
        values: a value of the function, or a tuple of values, such as ``rec``, that are normalized
            together. As tensors: [..., H], or of shapes that broadcast to it.
        weight, bias: a value or a number, for all; or a tuple with one for each of the values, such
            as an argument that is ``per_gate``. None: 1 and 0.
        eps: what is added to the variance.

    Returns:
        As ``values``: one, or a tuple of as many.

    Raises:
        TypeError: an argument is, or has in it, something else than values and numbers; ``values``
            has no value; a weight or bias is a tuple where ``values`` is none.
        ValueError: ``values`` is empty, a weight or bias has another length, or ``eps`` is not
            positive and finite.
    """
    is_one = not isinstance(values, tuple | list)
    each = [_checked("values", x) for x in ([values] if is_one else values)]
    if not each:
        _refuse(ValueError, "values must be a value or a tuple of at least one, got an empty one")
    if all(isinstance(x, float | int) for x in each):
        _refuse(TypeError, f"values must be a cell's value or a tuple of them, got {values!r}")
    weights = _of_each("weight", weight, each, is_one)
    biases = _of_each("bias", bias, each, is_one)
    if isinstance(eps, bool) or not isinstance(eps, float | int):
        _refuse(TypeError, f"eps must be a number, got {eps!r} of type {type(eps).__name__}")
    if not 0 < eps < math.inf:
        _refuse(ValueError, f"eps must be positive and finite, got {eps}")

    results = list(_normalized(each, float(eps)))
    for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
        results[k] = results[k] if w is None else results[k] * w
        results[k] = results[k] if b is None else results[k] + b
    return results[0] if is_one else tuple(results)


def _normalized(values: Sequence, eps: float) -> Sequence:
    recorder = next((x._recorder for x in values if isinstance(x, _trace.Value)), None)
    if recorder is None:
        return normalize(values, eps)
    given = [_elementwise._number(_trace._constant("layer_norm", x)) for x in values]
    return [recorder.record("normalized", float(k), *given, eps) for k in range(len(given))]


def _of_each(name: str, value: object, values: list, is_one: bool) -> list:
    """A weight or bias of each value."""
    if not isinstance(value, tuple | list):
        return [None if value is None else _checked(name, value)] * len(values)
    if is_one:
        _refuse(TypeError, f"{name} must be one value as values is, got {len(value)} of them")
    if len(value) != len(values):
        _refuse(
            ValueError,
            f"{name} must be one value or a tuple of {len(values)} as values is, got {len(value)}",
        )
    return [_checked(name, x) for x in value]


def _checked(name: str, value: object) -> object:
    is_number = isinstance(value, float | int) and not isinstance(value, bool)
    if not is_number and not isinstance(value, Tensor | _trace.Value):
        _refuse(
            TypeError,
            f"{name} must be made of a cell's values and of numbers, got {value!r} of type "
            f"{type(value).__name__}",
        )
    return value


def _refuse(error: type[Exception], what: str) -> NoReturn:
    raise error(f"layer_norm's {what} at {_trace._line()}")
