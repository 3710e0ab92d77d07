"""One autograd node for a whole network: every layer and direction of one module call.

Truncation is defined on the network, not on a layer, so the node spans the stack. It calls one
operator per layer and pass, and keeps what the backward pass cannot do without: each layer's input
and output, the mask of the dropout between layers, and nothing else (for tanh, relu and identity
the derivative follows from the output alone).
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

    num_layers: int
    directions: int
    has_biases: bool
    batch_first: bool
    nonlinearity: str
    dropout: float  # probability between layers; 0 outside training
    chunk: int  # steps after which the gradient is cut, or 0

    @property
    def weights_per_layer(self) -> int:
        return self.directions * (4 if self.has_biases else 2)


class Layer(NamedTuple):
    """What one layer read, as the backward pass will need it."""

    input: Tensor
    output: Tensor
    mask: Tensor | None  # the dropout that made `input` of the previous layer's output


def _rows(tensor: Tensor | None, net: Network, layer: int) -> Tensor | None:
    """The part of a [num_layers * directions, B, H] tensor that belongs to a layer."""
    if tensor is None or net.num_layers == 1:
        return tensor
    return tensor[layer * net.directions : (layer + 1) * net.directions]


def _weights(weights: Sequence[Tensor], net: Network, layer: int) -> list[Tensor]:
    per_layer = net.weights_per_layer
    return list(weights[layer * per_layer : (layer + 1) * per_layer])


def run_forward(
    net: Network,
    input: Tensor,
    hx: Tensor | None,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor, list[Layer]]:
    """Outputs of the top layer, final states of all, and what each layer read."""
    layers: list[Layer] = []
    final_states = []
    output = input
    for index in range(net.num_layers):
        layer_input, mask = output, None
        if net.dropout > 0 and index > 0:
            # The draw that torch's own modules make, so that one seed gives one mask.
            mask = torch.empty_like(output).bernoulli_(1 - net.dropout)
            mask.div_(1 - net.dropout)
            layer_input = output * mask
        output, h_n = ops.rnn_fwd(
            layer_input,
            _rows(hx, net, index),
            _weights(weights, net, index),
            net.has_biases,
            batch_sizes,
            net.batch_first,
            net.nonlinearity,
        )
        layers.append(Layer(layer_input, output, mask))
        final_states.append(h_n)
    h_n = final_states[0] if net.num_layers == 1 else torch.cat(final_states)
    return output, h_n, layers


class RecurrentFunction(torch.autograd.Function):
    """``apply(net, input, hx, batch_sizes, *weights) -> (output, h_n)``."""

    @staticmethod
    def forward(
        ctx: Any,
        net: Network,
        input: Tensor,
        hx: Tensor | None,
        batch_sizes: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        output, h_n, layers = run_forward(net, input, hx, batch_sizes, weights)
        ctx.set_materialize_grads(False)
        ctx.net = net
        ctx.save_for_backward(
            hx, batch_sizes, *weights, *(tensor for layer in layers for tensor in layer)
        )
        return output, h_n

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        net: Network = ctx.net
        hx, batch_sizes, *saved = ctx.saved_tensors
        num_weights = net.num_layers * net.weights_per_layer
        weights, saved = saved[:num_weights], saved[num_weights:]
        _, needs_input, needs_hx, _, *needs_weights = ctx.needs_input_grad
        if grad_output is None and grad_h_n is None:
            return (None,) * len(ctx.needs_input_grad)

        grad_hx: list[Tensor] = []
        grad_weights: list[Tensor] = []
        grad = grad_output
        for index in reversed(range(net.num_layers)):
            layer = Layer(*saved[index * len(Layer._fields) :][: len(Layer._fields)])
            per_layer = net.weights_per_layer
            needs = [
                needs_input or index > 0,
                needs_hx,
                any(needs_weights[index * per_layer : (index + 1) * per_layer]),
            ]
            d_input, d_hx, d_weights = ops.rnn_bwd(
                grad,
                _rows(grad_h_n, net, index),
                layer.input,
                layer.output,
                _rows(hx, net, index),
                _weights(weights, net, index),
                net.has_biases,
                batch_sizes,
                net.batch_first,
                net.nonlinearity,
                net.chunk,
                needs,
            )
            grad = d_input if layer.mask is None else d_input * layer.mask
            grad_hx.insert(0, d_hx)
            grad_weights[:0] = d_weights
        return (
            None,
            grad if needs_input else None,
            torch.cat(grad_hx) if needs_hx else None,
            None,
            *(g if needed else None for g, needed in zip(grad_weights, needs_weights, strict=True)),
        )


def run(
    net: Network,
    input: Tensor,
    hx: Tensor | None,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Output and final states of a network, with a gradient where one can be asked for."""
    if torch.is_grad_enabled():
        return RecurrentFunction.apply(net, input, hx, batch_sizes, *weights)
    output, h_n, _ = run_forward(net, input, hx, batch_sizes, weights)
    return output, h_n
