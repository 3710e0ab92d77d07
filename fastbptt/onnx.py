"""The network in a graph that is exported to ONNX, whose operators RNN, GRU and LSTM it becomes.

An exporter knows torch's recurrent operators and not those of this package, so torch's stand in its
graph. A truncation plays no part there: it belongs to the backward pass.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastbptt.call import Call

# torch's own computation of each cell.
TORCH_FUNCTIONS = {
    "tanh": torch._VF.rnn_tanh,
    "relu": torch._VF.rnn_relu,
    "gru": torch._VF.gru,
    "lstm": torch._VF.lstm,
}

# ONNX's operator of each cell, its attributes for one direction (those of a list are per
# direction), and torch's gates in ONNX's order.
_OPERATORS: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "tanh": ("RNN", {"activations": ["Tanh"]}, [0]),
    "relu": ("RNN", {"activations": ["Relu"]}, [0]),
    "identity": (
        "RNN",
        {"activations": ["Affine"], "activation_alpha": [1.0], "activation_beta": [0.0]},
        [0],
    ),
    "gru": ("GRU", {"linear_before_reset": 1}, [1, 0, 2]),
    "lstm": ("LSTM", {}, [0, 3, 1, 2]),
}


def is_exporting() -> bool:
    """Whether one of torch's two ONNX exporters is at work; does not import them, which is slow."""
    if torch.compiler.is_dynamo_compiling() or "torch.onnx" not in sys.modules:
        return False
    return torch.onnx.is_in_onnx_export()


def check(call: Call) -> None:
    """Raises NotImplementedError for what ONNX's recurrent operators cannot compute."""
    if call.resets is not None:
        raise NotImplementedError("resets cannot be exported: ONNX's recurrent operators have none")


def network(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_sizes: Tensor | None,
    batch_first: bool,
    cell: str,
    dropout: float,
    *backward: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of that name in the terms of an exporter; ``backward`` plays no part.

    Raises:
        NotImplementedError: ONNX has no projection, or the older exporter no such nonlinearity.
    """
    if len(weights) % (4 if has_biases else 2) > 0:
        raise NotImplementedError("proj_size cannot be exported: ONNX's LSTM has no projection")
    # torch.jit's tracer is the older exporter's, which reads torch's operators. The other one
    # unrolls some of them, and fixes the number of steps in all.
    if (
        batch_sizes is None
        and (dropout == 0 or num_layers == 1)
        and not torch.jit.is_tracing()
        and hasattr(torch.onnx, "ops")
    ):
        return _by_operators(
            input, hx, cx, weights, has_biases, num_layers, bidirectional, batch_first, cell
        )
    if cell not in TORCH_FUNCTIONS:
        raise NotImplementedError(
            f"nonlinearity={cell!r} cannot be exported to ONNX by way of torch's operators"
        )
    if hx is None:
        batch = input.shape[0 if batch_first else 1] if batch_sizes is None else batch_sizes[0]
        count = num_layers * (2 if bidirectional else 1)
        hx = _zeros(input, count, batch, weights[1].shape[1])
        cx = _zeros(input, count, batch, weights[1].shape[0] // 4) if cell == "lstm" else None
    options = (weights, has_biases, num_layers, dropout, dropout > 0, bidirectional)
    states = hx if cx is None else (hx, cx)
    compute = TORCH_FUNCTIONS[cell]
    if batch_sizes is None:
        output, h_n, *c_n = compute(input, states, *options, batch_first)
    else:
        output, h_n, *c_n = compute(input, batch_sizes, states, *options)
    return output, h_n, c_n[0] if c_n else input.new_empty(0)


def _zeros(input: Tensor, *shape: int | Tensor) -> Tensor:
    # A size that the graph computes stays one, which new_zeros would make a number.
    return torch.zeros(shape, dtype=input.dtype, device=input.device)  # type: ignore[arg-type]


def _by_operators(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX's operators themselves, one a layer, as nodes of the graph that torch.export makes."""
    directions = 2 if bidirectional else 1
    operator, attributes, order = _OPERATORS[cell]
    hidden_size, kinds = weights[1].shape[1], 4 if has_biases else 2
    output = input.transpose(0, 1) if batch_first else input  # [T, B, I]
    steps, batch = output.shape[:2]
    attributes = {
        "direction": "bidirectional" if bidirectional else "forward",
        "hidden_size": hidden_size,
        **{n: v * directions if isinstance(v, list) else v for n, v in attributes.items()},
    }
    state = (directions, batch, hidden_size)
    states: tuple[list[Tensor], ...] = tuple([] for _ in range(2 if cell == "lstm" else 1))
    for layer in range(num_layers):
        first = layer * kinds * directions
        rows = slice(layer * directions, (layer + 1) * directions)
        # W_ih, W_hh, b_ih and b_hh: each of both directions, the gates in ONNX's order.
        by_kind = [
            torch.stack(
                [
                    torch.cat([weights[i].chunk(len(order))[gate] for gate in order])
                    for i in range(first + kind, first + kinds * directions, kinds)
                ]
            )
            for kind in range(kinds)
        ]
        bias = torch.cat(by_kind[2:], 1) if has_biases else None
        initial = [s[rows] for s in (hx, cx) if s is not None]
        # Y [T, D, B, H], Y_h [D, B, H], and an LSTM's Y_c
        output, *last = torch.onnx.ops.symbolic_multi_out(
            f"::{operator}",
            (output, *by_kind[:2], *((bias, None, *initial) if initial else (bias,))),
            attributes,
            dtypes=[input.dtype] * (1 + len(states)),
            shapes=[(steps, directions, batch, hidden_size), *[state] * len(states)],
        )
        output = output.transpose(1, 2).reshape(steps, batch, directions * hidden_size)
        for of_all, of_layer in zip(states, last, strict=True):
            of_all.append(of_layer)
    output = output.transpose(0, 1) if batch_first else output
    h_n, *c_n = (torch.cat(each) for each in states)
    return output, h_n, c_n[0] if c_n else input.new_empty(0)
