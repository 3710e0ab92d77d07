"""What the operators of tangents return for tensors without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbptt import _C
from fastbptt.ops import check_given, num_sequences


def _check_tangents(**pairs: tuple[Tensor | None, Tensor | None]) -> None:
    """Each tangent, where there is one, is of its tensor's shape."""
    for name, (tangent, of) in pairs.items():
        if tangent is not None and of is not None and tangent.shape != of.shape:
            raise RuntimeError(
                f"{name} must have shape {tuple(of.shape)}, got {tuple(tangent.shape)}"
            )


def _check_layer(
    grads: Sequence[Tensor | None],
    layer: Sequence[Any],
    k1: int,
    resets: Tensor | None,
    kappa: Tensor | None,
) -> None:
    """What a pass over a layer's results takes, as rnn_bwd checks it; its arguments' order too.

    ``grads`` are those of output, h_n and c_n, ``layer`` all that follows them, from input to cell.
    """
    input, output, c, gates, *_ = layer
    check_given(input=input, output=output, c=c, gates=gates)
    needs, windows = [False] * 4, (k1, k1, False, resets, kappa)
    _C.check_backward(*grads, *layer, needs, *windows, None, 0, 0, False, False, None)


@torch.library.register_fake("fastbptt::rnn_jvp")
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
    layer = (input, output, c, gates, hx, cx, weights, has_biases, batch_sizes, batch_first, cell)
    _check_layer((None, None, None), layer, k1, resets, kappa)
    _check_tangents(input_t=(input_t, input), hx_t=(hx_t, hx), cx_t=(cx_t, cx))
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


@torch.library.register_fake("fastbptt::rnn_bwd_jvp")
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
    layer = (input, output, c, gates, hx, cx, weights, has_biases, batch_sizes, batch_first, cell)
    _check_layer((grad_output, grad_h_n, grad_c_n), layer, k1, resets, kappa)
    check_given(output_t=output_t, c_t=c_t, gates_t=gates_t)
    _check_tangents(
        input_t=(input_t, input),
        output_t=(output_t, output),
        c_t=(c_t, c),
        gates_t=(gates_t, gates),
        hx_t=(hx_t, hx),
        cx_t=(cx_t, cx),
    )
    return (
        _like(input, needs[0], input),
        _like(input, needs[1], input),
        _like(hx, needs[2], input),
        _like(cx, needs[3], input),
        [_like(weight, needs[4], input) for weight in weights],
    )


@torch.library.register_fake("fastbptt::rnn_bwd_apart")
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
    layer = (input, output, c, gates, hx, cx, weights, has_biases, batch_sizes, batch_first, cell)
    _check_layer((grad_output, grad_h_n, grad_c_n), layer, k1, resets, kappa)
    return (
        _like(input, needs[0], input),
        _like(hx, needs[1], input),
        _like(cx, needs[2], input),
        [input.new_empty((groups, *weight.shape) if needs[3] else (0,)) for weight in weights],
    )


@torch.library.register_fake("fastbptt::rnn_jvp_steps")
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
    check_given(pre=pre, output=output, c=c, gates=gates, before=before, w_hh=w_hh)
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


@torch.library.register_fake("fastbptt::rnn_bwd_jvp_steps")
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
    check_given(output=output, c=c, gates=gates, before=before, w_hh=w_hh)
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
