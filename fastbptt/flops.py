"""How many floating-point operations a pass takes, for ``torch.utils.flop_counter``.

As torch counts there: a product of [m, k] and [k, n] is 2 m k n, and nothing else counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastbptt.late import when_imported
from fastbptt.ops import GATES


def _forward(arguments: dict[str, Any]) -> int:
    rows = arguments["input"].shape[:-1].numel()
    return rows * sum(map(_of_weight, _matrices(arguments)))


def _backward(arguments: dict[str, Any]) -> int:
    input, weights = arguments["input"], _matrices(arguments)
    needs_input, needs_hx, needs_cx, needs_weights = arguments["needs"]
    of_step = _rows_of_steps(arguments)
    spans = _windows(arguments, len(of_step))
    before = [0, *itertools.accumulate(of_step)]  # the rows before each step
    lane_rows = sum(before[end] - before[begin] for begin, end in spans)
    has_states = needs_hx or needs_cx
    rows = before[spans[-1][1]] - before[spans[0][0]] if spans else 0
    total = 0
    for reverse, (w_ih, w_hh, *w_hr) in enumerate(_directions(weights, arguments)):
        # From a state's gradient to that of the state before: not out of a window's first step,
        # unless that begins with a state that has a gradient too.
        firsts = [end - 1 if reverse else begin for begin, end in spans]
        given = len(of_step) - 1 if reverse else 0
        entered = sum(of_step[t] for t in firsts if not has_states or t != given)
        total += (lane_rows - entered) * _of_weight(w_hh)
        total += lane_rows * sum(map(_of_weight, w_hr))
        if needs_input:
            total += (lane_rows if arguments["input_by_lane"] else rows) * _of_weight(w_ih)
        if needs_weights:
            total += rows * sum(map(_of_weight, (w_ih, w_hh, *w_hr)))
        if GATES[arguments["cell"]] > 1 and arguments["gates"].numel() == 0:  # computed again
            total += input.shape[:-1].numel() * (_of_weight(w_ih) + _of_weight(w_hh))
    return total


def _network_backward(arguments: dict[str, Any]) -> int:
    kept, weights = arguments["kept"], arguments["weights"]
    needs_input, needs_hx, needs_cx, *needs_weights = arguments["needs"]
    num_layers = arguments["num_layers"]
    tensors, per_layer = len(kept) // num_layers, len(weights) // num_layers
    total = 0
    for layer in range(num_layers):
        own = slice(layer * per_layer, (layer + 1) * per_layer)
        input, _, _, gates = kept[layer * tensors : (layer + 1) * tensors]
        needs = (needs_input or layer > 0, needs_hx, needs_cx, any(needs_weights[own]))
        of_layer = {"input": input, "gates": gates, "weights": weights[own], "needs": needs}
        by_lane = layer > 0 and arguments["k2"] > arguments["k1"]
        total += _backward(arguments | of_layer | {"input_by_lane": by_lane, "num_windows": 0})
    return total


def _tangents(arguments: dict[str, Any]) -> int:
    rows = arguments["input"].shape[:-1].numel()
    total = 0
    for own, own_t in _with_tangents(arguments):
        w_ih, *others = own
        given = [arguments["input_t"] is not None, *[True] * len(others)]
        for weight, tangent, has_factor in zip(own, own_t, given, strict=True):
            total += rows * _of_weight(weight) * (has_factor + (tangent is not None))
    return total


def _backward_tangents(arguments: dict[str, Any]) -> int:
    rows = arguments["input"].shape[:-1].numel()
    needs_value, needs_input, _, _, needs_weights = arguments["needs"]
    total = 0
    for (w_ih, *others), (w_ih_t, *others_t) in _with_tangents(arguments):
        # The steps: the values' product, the tangents', and that with the weights' tangents.
        steps = 2 + any(tangent is not None for tangent in others_t)
        total += steps * rows * sum(map(_of_weight, others))
        of_input = needs_value + needs_input * (1 + (w_ih_t is not None))
        total += of_input * rows * _of_weight(w_ih)
        if needs_weights:
            total += (1 + (arguments["input_t"] is not None)) * rows * _of_weight(w_ih)
            total += 2 * rows * sum(map(_of_weight, others))
    return total


def _backward_apart(arguments: dict[str, Any]) -> int:
    rows = arguments["input"].shape[:-1].numel()
    needs_input, _, _, needs_weights = arguments["needs"]
    total = 0
    for w_ih, *others in _directions(_matrices(arguments), arguments):
        total += rows * (needs_input + needs_weights) * _of_weight(w_ih)
        total += rows * (1 + needs_weights) * sum(map(_of_weight, others))
    return total


def _with_tangents(arguments: dict[str, Any]) -> list[tuple[list[Tensor], list[Any]]]:
    """Of each direction the matrices, and the tangents of each or None."""
    weights = arguments["weights"]
    tangents = arguments["weights_t"] or [None] * len(weights)
    of_matrices = [t for w, t in zip(weights, tangents, strict=True) if w.dim() == 2]
    directions = _directions(_matrices(arguments), arguments)
    count = len(directions[0])
    split = [of_matrices[i : i + count] for i in range(0, len(of_matrices), count)]
    return list(zip(directions, split, strict=True))


def _of_weight(weight: Tensor) -> int:
    """The operations of its product with one row."""
    return 2 * weight.numel()


def _matrices(arguments: dict[str, Any]) -> list[Tensor]:
    return [weight for weight in arguments["weights"] if weight.dim() == 2]


def _directions(matrices: list[Tensor], arguments: dict[str, Any]) -> list[list[Tensor]]:
    """W_ih, W_hh and, if there is one, the projection of each direction."""
    directions = 2 if len(arguments["weights"]) >= 2 * (4 if arguments["has_biases"] else 2) else 1
    per_direction = len(matrices) // directions
    return [matrices[i : i + per_direction] for i in range(0, len(matrices), per_direction)]


def _rows_of_steps(arguments: dict[str, Any]) -> list[int]:
    if arguments["batch_sizes"] is not None:
        return arguments["batch_sizes"].tolist()
    steps, batch = arguments["input"].shape[:2]
    if arguments["batch_first"]:
        steps, batch = batch, steps
    return [batch] * steps


def _windows(arguments: dict[str, Any], T: int) -> list[tuple[int, int]]:
    """The first step of each window and the one after its last."""
    k1, k2, count = arguments["k1"], arguments["k2"], arguments["num_windows"]
    if k1 == 0:
        return [(0, T)] if T > 0 else []
    first = arguments["first_window"] if count > 0 else 0
    end = first + count if count > 0 else -(-T // k1)
    return [(max(0, j * k1 - (k2 - k1)), min((j + 1) * k1, T)) for j in range(first, end)]


def _formula(operator: Any, count: Callable[[dict[str, Any]], int]) -> Callable[..., int]:
    schema = operator.default._schema.arguments

    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        values = {a.name: a.default_value for a in schema if a.has_default_value()}
        values |= dict(zip((a.name for a in schema), args, strict=False))
        return count(values | kwargs)

    return formula


def _register(flop_counter: ModuleType) -> None:
    operators = torch.ops.fastbptt
    counts = {
        operators.rnn_fwd: _forward,
        operators.rnn_bwd: _backward,
        operators.network_bwd: _network_backward,
        operators.rnn_jvp: _tangents,
        operators.rnn_bwd_jvp: _backward_tangents,
        operators.rnn_bwd_apart: _backward_apart,
    }
    for operator, count in counts.items():
        register = flop_counter.register_flop_formula(operator, get_raw=True)
        register(_formula(operator, count))


when_imported("torch.utils.flop_counter", _register)
