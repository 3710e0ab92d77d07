"""Gradients that reach back a given number of steps, for the losses of all steps at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastbptt import ops
from fastbptt.nn import GRU, LSTM, RNN

__all__ = ["Layer", "lag_sums", "run_layers"]


class Layer(NamedTuple):
    """One layer's run. Step t of sequence b is row t * B + b: N = T * B rows."""

    cell: str
    weights: Sequence[Tensor]
    has_biases: bool
    input: Tensor  # [1, N, I]
    output: Tensor  # [1, N, R]: h after each step
    c: Tensor  # [1, N, H], or [0, N, H] where there is none
    gates: Tensor  # [1, N, S*H], or empty


def run_layers(
    rnn: RNN | GRU | LSTM, steps: Tensor, states: Sequence[Tensor], is_reset: Tensor | None
) -> list[Layer]:
    """The forward pass, of which every layer keeps what its backward steps need.

    steps [T, B, I]; states [num_layers, B, ...] each; is_reset [T, B]: where the state entering a
    step is zeros.
    """
    weights = rnn._weights()
    count = len(weights) // rnn.num_layers
    layers = []
    for i in range(rnn.num_layers):
        of_layer = weights[i * count : (i + 1) * count]
        output, _, _, c, gates = ops.rnn_fwd(
            input=steps,
            hx=states[0][i : i + 1],
            cx=states[1][i : i + 1] if len(states) > 1 else None,
            weights=of_layer,
            has_biases=rnn.bias,
            batch_sizes=None,
            batch_first=False,
            cell=rnn._cell,
            keep_gates=True,
            resets=is_reset,
        )
        rows = [tensor.flatten(0, 1).unsqueeze(0) for tensor in (steps, output)]
        layers.append(Layer(rnn._cell, of_layer, rnn.bias, *rows, c, gates))
        steps = output
    return layers


def _back_one_step(
    layer: Layer,
    rows: slice,
    before: slice,
    grad_output: Tensor | None,
    grad_states: Sequence[Tensor | None],
    is_reset: Tensor | None,
    needs_input: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Steps of a layer backward, each by itself: a batch of sequences that are one step long.

    ``rows`` are the steps, and ``before`` those before them, whose states they start from. From
    the gradients in the steps' output and in the states after them, those in the steps' input and
    in the states before them; [1, rows, ...] all.
    """
    is_lstm = layer.cell == "lstm"
    d_input, d_hx, d_cx, _ = ops.rnn_bwd(
        grad_output=grad_output,
        grad_h_n=grad_states[0],
        grad_c_n=grad_states[1] if is_lstm else None,
        input=layer.input[:, rows],
        output=layer.output[:, rows],
        c=layer.c[:, rows],
        gates=layer.gates[:, rows],
        hx=layer.output[:, before],
        cx=layer.c[:, before] if is_lstm else None,
        weights=layer.weights,
        has_biases=layer.has_biases,
        batch_sizes=None,
        batch_first=False,
        cell=layer.cell,
        needs=[needs_input, True, is_lstm, False],
        resets=None if is_reset is None else is_reset[:, rows],
    )
    return d_input, [d_hx, d_cx] if is_lstm else [d_hx]


def lag_sums(
    layers: Sequence[Layer], grad: Tensor, max_lag: int, is_reset: Tensor | None
) -> Tensor:
    """Sums of norms over t and the batch, [max_lag + 1]: of g_t and then of dL_t/dS_{t-k}.

    grad: g [T, B, R]. The recursion is V^k_s = J_{s+1}^T V^{k-1}_{s+1} with V^k_s = dL_{s+k}/dS_s
    and J_s the Jacobian of step s: each lag is one backward step, of every t and b at once.
    """
    T, B = grad.shape[:2]
    sums = [torch.linalg.vector_norm(grad, dim=-1, dtype=torch.float64).sum()]
    if is_reset is not None:
        is_reset = is_reset.reshape(1, T * B)
    num_states = 2 if layers[0].cell == "lstm" else 1
    carried: list[list[Tensor | None]] = [[None] * num_states for _ in layers]
    for lag in range(1, max_lag + 1):
        # From dL_t/dS_s for t = s + lag - 1 and s = 1, ..., T - lag to dL_t/dS_{s-1}. What has
        # come to s = 0 goes no further.
        rows, before = slice(B, (T - lag + 1) * B), slice(0, (T - lag) * B)
        d_output = grad[1:].reshape(1, (T - 1) * B, -1) if lag == 1 else None
        norms = []
        for i in reversed(range(len(layers))):
            after = [None if state is None else state[:, B:] for state in carried[i]]
            d_output, carried[i] = _back_one_step(
                layers[i], rows, before, d_output, after, is_reset, needs_input=i > 0
            )
            norms += [
                torch.linalg.vector_norm(state, dim=-1, dtype=torch.float64) for state in carried[i]
            ]
        sums.append(torch.linalg.vector_norm(torch.stack(norms), dim=0).sum())
    return torch.stack(sums)
