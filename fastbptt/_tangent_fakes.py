"""What the operators of tangents return for tensors without data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbptt.ops import num_sequences, register_fake

_LAYER = ("input", "output", "c", "gates")
_STEPS = ("output", "c", "gates", "before", "w_hh")


@register_fake("rnn_jvp", *_LAYER)
def _(
    input: Tensor,
    output: Tensor,
    c: Tensor,
    gates: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    input_t: Tensor | None,
    hx_t: Tensor | None,
    cx_t: Tensor | None,
    weights_t: Sequence[Tensor | None],
    has_biases: bool,
    batch_sizes: Tensor | None,
    batch_first: bool,
    cell: str,
    k1: int = 0,
    resets: Tensor | None = None,
    kappa: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    state_size = weights[1].shape[1]
    directions = output.shape[-1] // state_size
    batch = num_sequences(batch_sizes, input.shape[0 if batch_first else 1], hx, cx)
    return (
        torch.empty_like(output, memory_format=torch.contiguous_format),
        output.new_empty((directions, batch, state_size)),
        output.new_empty((c.shape[0], batch, c.shape[2])),
        torch.empty_like(c),
        torch.empty_like(gates),
    )


def _like(tensor: Tensor | None, is_needed: bool, input: Tensor) -> Tensor:
    if tensor is None or not is_needed:
        return input.new_empty(0)
    return input.new_empty(tensor.shape)


@register_fake("rnn_bwd_jvp", *_LAYER, "output_t", "c_t", "gates_t")
def _(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_output_t: Tensor | None,
    grad_h_n_t: Tensor | None,
    grad_c_n_t: Tensor | None,
    input: Tensor,
    output: Tensor,
    c: Tensor,
    gates: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    input_t: Tensor | None,
    output_t: Tensor,
    c_t: Tensor,
    gates_t: Tensor,
    hx_t: Tensor | None,
    cx_t: Tensor | None,
    weights_t: Sequence[Tensor | None],
    has_biases: bool,
    batch_sizes: Tensor | None,
    batch_first: bool,
    cell: str,
    needs: Sequence[bool],
    k1: int = 0,
    resets: Tensor | None = None,
    kappa: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    return (
        _like(input, needs[0], input),
        _like(input, needs[1], input),
        _like(hx, needs[2], input),
        _like(cx, needs[3], input),
        [_like(weight, needs[4], input) for weight in weights],
    )


@register_fake("rnn_bwd_apart", *_LAYER)
def _(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    output: Tensor,
    c: Tensor,
    gates: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    has_biases: bool,
    batch_sizes: Tensor | None,
    batch_first: bool,
    cell: str,
    needs: Sequence[bool],
    groups: int,
    k1: int = 0,
    resets: Tensor | None = None,
    kappa: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    return (
        _like(input, needs[0], input),
        _like(hx, needs[1], input),
        _like(cx, needs[2], input),
        [input.new_empty((groups, *weight.shape) if needs[3] else (0,)) for weight in weights],
    )


@register_fake("rnn_jvp_steps", "pre", *_STEPS)
def _(
    pre: Tensor,
    projected: Tensor | None,
    hx_t: Tensor | None,
    cx_t: Tensor | None,
    output: Tensor,
    c: Tensor,
    gates: Tensor,
    before: Tensor,
    gate: Tensor | None,
    w_hh: Tensor,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    T: int,
    batch_first: bool,
    reverse: bool,
    cell: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, state_size = output.shape
    batch = num_sequences(batch_sizes, rows // T)
    saved = {"gru": 4 * state_size, "lstm": 4 * c.shape[1]}.get(cell, 0)
    return (
        pre.new_empty(output.shape),
        pre.new_empty(c.shape),
        pre.new_empty((rows, saved)),
        pre.new_empty((batch, state_size)),
        pre.new_empty((batch if cell == "lstm" else 0, c.shape[1])),
    )


@register_fake("rnn_bwd_jvp_steps", *_STEPS)
def _(
    d_output: Tensor | None,
    d_output_t: Tensor | None,
    d_h_n: Tensor | None,
    d_h_n_t: Tensor | None,
    d_c_n: Tensor | None,
    d_c_n_t: Tensor | None,
    output: Tensor,
    c: Tensor,
    gates: Tensor,
    before: Tensor,
    output_t: Tensor | None,
    c_t: Tensor | None,
    gates_t: Tensor | None,
    before_t: Tensor | None,
    gate: Tensor | None,
    w_hh: Tensor,
    w_hr: Tensor | None,
    needs_states: bool,
    batch_sizes: Tensor | None,
    T: int,
    batch_first: bool,
    reverse: bool,
    cell: str,
) -> tuple[Tensor, ...]:
    rows, state_size = output.shape
    hidden_size = c.shape[1] if cell == "lstm" else state_size
    columns = {"gru": 4, "lstm": 4}.get(cell, 1) * hidden_size
    batch = num_sequences(batch_sizes, rows // T) if needs_states else 0
    with_c = batch if cell == "lstm" else 0
    projected = 0 if w_hr is None else rows
    sizes = (
        (rows, columns),
        (projected, state_size),
        (batch, state_size),
        (with_c, hidden_size),
    )
    results = []
    for count, width in sizes:
        results.append(output.new_empty((count, width)))
        results.append(output.new_empty((0 if output_t is None else count, width)))
    return tuple(results)
