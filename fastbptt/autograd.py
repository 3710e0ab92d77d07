"""One autograd node for a whole network: every layer and direction of one module call.

Truncation is defined on the network, not on a layer, so the node spans the stack. It calls one
operator per layer and pass, and keeps what the backward pass cannot do without: each layer's input
and output, the mask of the dropout between layers, and of a gated cell its activations (for the
Elman cell the derivative follows from the output alone).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbptt import ops


class Network(NamedTuple):
    """What a call is besides its tensors."""

    cell: str  # "tanh", "relu", "identity", "gru" or "lstm"
    num_layers: int
    directions: int
    has_biases: bool
    has_projection: bool
    batch_first: bool
    dropout: float  # probability between layers; 0 outside training
    chunk: int  # steps after which the gradient is cut, or 0
    recompute: bool  # the activations of a gated cell in the backward pass, instead of keeping them

    @property
    def weights_per_layer(self) -> int:
        return self.directions * (2 + 2 * self.has_biases + self.has_projection)


class Layer(NamedTuple):
    """What one layer read and computed, as the backward pass will need it."""

    input: Tensor
    output: Tensor
    c: Tensor
    gates: Tensor
    mask: Tensor | None  # the dropout that made `input` of the previous layer's output


def _of_layer(states: Tensor | None, net: Network, index: int) -> Tensor | None:
    """The part of a [num_layers * directions, B, R] tensor that belongs to a layer."""
    if states is None or net.num_layers == 1:
        return states
    return states[index * net.directions : (index + 1) * net.directions]


def _weights(weights: Sequence[Tensor], net: Network, index: int) -> Sequence[Tensor]:
    per_layer = net.weights_per_layer
    return weights[index * per_layer : (index + 1) * per_layer]


def _cat(states: list[Tensor]) -> Tensor:
    return states[0] if len(states) == 1 else torch.cat(states)


def _dropout_mask(like: Tensor, probability: float) -> Tensor:
    if probability == 1:
        return torch.zeros_like(like)
    # The draw that torch's own modules make, so that one seed gives one mask.
    return torch.empty_like(like).bernoulli_(1 - probability).div_(1 - probability)


def run_forward(
    net: Network,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    keep_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Layer]]:
    """Outputs of the top layer, final states of all, and what each layer read and computed."""
    layers: list[Layer] = []
    h_n, c_n = [], []
    output = input
    for index in range(net.num_layers):
        layer_input, mask = output, None
        if net.dropout > 0 and index > 0:
            mask = _dropout_mask(output, net.dropout)
            layer_input = output * mask
        output, layer_h_n, layer_c_n, c, gates = ops.rnn_fwd(
            layer_input,
            _of_layer(hx, net, index),
            _of_layer(cx, net, index),
            _weights(weights, net, index),
            net.has_biases,
            batch_sizes,
            net.batch_first,
            net.cell,
            keep_gates,
        )
        layers.append(Layer(layer_input, output, c, gates, mask))
        h_n.append(layer_h_n)
        c_n.append(layer_c_n)
    return output, _cat(h_n), _cat(c_n), layers


class RecurrentFunction(torch.autograd.Function):
    """``apply(net, input, hx, cx, batch_sizes, *weights) -> (output, h_n, c_n)``.

    ``c_n`` is empty for a cell that has no cell state.
    """

    @staticmethod
    def forward(
        ctx: Any,
        net: Network,
        input: Tensor,
        hx: Tensor | None,
        cx: Tensor | None,
        batch_sizes: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        output, h_n, c_n, layers = run_forward(
            net, input, hx, cx, batch_sizes, weights, not net.recompute
        )
        ctx.set_materialize_grads(False)
        ctx.net = net
        ctx.save_for_backward(
            hx, cx, batch_sizes, *weights, *(tensor for layer in layers for tensor in layer)
        )
        return output, h_n, c_n

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        net: Network = ctx.net
        hx, cx, batch_sizes, *saved = ctx.saved_tensors
        num_weights = net.num_layers * net.weights_per_layer
        weights, saved = saved[:num_weights], saved[num_weights:]
        _, needs_input, needs_hx, needs_cx, _, *needs_weights = ctx.needs_input_grad
        if grad_output is None and grad_h_n is None and grad_c_n is None:
            return (None,) * len(ctx.needs_input_grad)

        grad_hx: list[Tensor] = []
        grad_cx: list[Tensor] = []
        grad_weights: list[Tensor] = []
        grad = grad_output
        for index in reversed(range(net.num_layers)):
            layer = Layer(*saved[index * len(Layer._fields) :][: len(Layer._fields)])
            d_input, d_hx, d_cx, d_weights = ops.rnn_bwd(
                grad,
                _of_layer(grad_h_n, net, index),
                _of_layer(grad_c_n, net, index),
                layer.input,
                layer.output,
                layer.c,
                layer.gates,
                _of_layer(hx, net, index),
                _of_layer(cx, net, index),
                _weights(weights, net, index),
                net.has_biases,
                batch_sizes,
                net.batch_first,
                net.cell,
                net.chunk,
                [
                    needs_input or index > 0,
                    needs_hx,
                    needs_cx,
                    any(_weights(needs_weights, net, index)),
                ],
            )
            grad = d_input if layer.mask is None else d_input * layer.mask
            grad_hx.insert(0, d_hx)
            grad_cx.insert(0, d_cx)
            grad_weights[:0] = d_weights
        return (
            None,
            grad if needs_input else None,
            _cat(grad_hx) if needs_hx else None,
            _cat(grad_cx) if needs_cx else None,
            None,
            *(g if needed else None for g, needed in zip(grad_weights, needs_weights, strict=True)),
        )


def run(
    net: Network,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and final states of a network, with a gradient where one can be asked for."""
    if torch.is_grad_enabled():
        return RecurrentFunction.apply(net, input, hx, cx, batch_sizes, *weights)
    return run_forward(net, input, hx, cx, batch_sizes, weights, keep_gates=False)[:3]
