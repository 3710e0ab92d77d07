"""What the operators of tangents return for tensors without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastbptt import _C
from fastbptt.ops import GATES, check_given, num_sequences


def _check_like(name: str, tensor: Tensor | None, shape: Sequence[object], like: Tensor) -> None:
    """Of that shape and of the other's dtype and device, or None.

    Sizes that are not known are any: a trace that asks for symbols holds for few.
    """
    if tensor is None:
        return
    known = [size if isinstance(size, int) else None for size in shape]
    pairs = zip(tensor.shape, known, strict=False)
    wrong = any(isinstance(own, int) and None is not size != own for own, size in pairs)
    if tensor.dim() != len(shape) or wrong:
        sizes = ["_" if size is None else size for size in known]
        raise RuntimeError(f"{name} must have shape {sizes}, got {list(tensor.shape)}")
    if tensor.dtype != like.dtype:
        raise RuntimeError(f"{name} must have input's dtype {like.dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise RuntimeError(f"{name} must be on input's device {like.device}, got {tensor.device}")


def _check_tangents(**pairs: tuple[Tensor | None, Tensor | None]) -> None:
    """Each tangent, where there is one, is like its tensor."""
    for name, (tangent, of) in pairs.items():
        if of is not None:
            _check_like(name, tangent, of.shape, of)


def _check_weights(weights_t: Sequence[Tensor | None], weights: Sequence[Tensor]) -> None:
    if len(weights_t) not in (0, len(weights)):
        raise RuntimeError(
            f"weights_t must hold {len(weights)} tangents or none, got {len(weights_t)}"
        )
    for i, (tangent, of) in enumerate(zip(weights_t, weights, strict=False)):
        _check_like(f"weights_t[{i}]", tangent, of.shape, of)


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


def _check_states(layer: Sequence[Any], **states: tuple[Tensor | None, Tensor | None]) -> None:
    """Of each name the tensors like h_n, and like c_n."""
    input, output, c, _, hx, cx, weights, _, batch_sizes, batch_first, _ = layer
    state_size = weights[1].shape[1]
    batch = None
    if not isinstance(batch_sizes, FakeTensor):  # it has no values to read
        batch = num_sequences(batch_sizes, input.shape[0 if batch_first else 1], hx, cx)
    h_shape = (output.shape[-1] // state_size, batch, state_size)
    for name, (h, c_like) in states.items():
        _check_like(name.format("h"), h, h_shape, input)
        _check_like(name.format("c"), c_like, (c.shape[0], batch, c.shape[2]), input)


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
    _check_tangents(input_t=(input_t, input))
    _check_states(layer, **{"{}x_t": (hx_t, cx_t)})
    _check_weights(weights_t, weights)
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
        grad_output_t=(grad_output_t, output),
    )
    states = {"{}x_t": (hx_t, cx_t), "grad_{}_n_t": (grad_h_n_t, grad_c_n_t)}
    _check_states(layer, **states)
    _check_weights(weights_t, weights)
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


def _check_steps(
    layer: Sequence[Any],
    of_rows: dict[str, Tensor | None],
    of_sequences: dict[str, Tensor | None],
    copies: int = 1,
) -> None:
    """What one direction's steps take; see check_steps of csrc/tangents.h.

    ``of_rows`` and ``of_sequences`` have a row for each step of each sequence, or one for each
    sequence. Which columns they have the name says: of c, of gates, of pre, or of the output.
    """
    output, c, gates, before, gate, w_hh, w_hr, batch_sizes, T, cell = layer
    check_given(output=output, c=c, gates=gates, before=before, w_hh=w_hh)
    if output.dtype not in (torch.float32, torch.float64):
        raise NotImplementedError(f"output must have dtype float32 or float64, got {output.dtype}")
    if output.dim() != 2:
        raise RuntimeError(f"output must have 2 dimensions, got {output.dim()}")
    if cell not in GATES:
        raise RuntimeError(f"cell must be one of {', '.join(GATES)}, got {cell}")
    (rows, state_size), is_lstm = output.shape, cell == "lstm"
    if is_lstm and c.dim() != 2:
        raise RuntimeError(f"c must have 2 dimensions, got {c.dim()}")
    if T < 1:
        raise RuntimeError(f"T must be positive, got {T}")
    hidden_size = c.shape[1] if is_lstm else state_size
    batch = None
    if not isinstance(batch_sizes, FakeTensor):
        batch = num_sequences(batch_sizes, rows // T)
    width = {"c": hidden_size, "gates": 4 * hidden_size, "before": hidden_size}
    width["pre"] = (4 if cell == "gru" else GATES[cell]) * hidden_size
    kept = {"gates": gates, "before": before} if GATES[cell] > 1 else {}
    kept |= {"c": c} if is_lstm else {}
    twice = copies == 2 and w_hh.shape[:1] != (GATES[cell] * hidden_size,)
    copies = 2 if twice else 1
    _check_like("w_hh", w_hh, (copies * GATES[cell] * hidden_size, state_size), output)
    _check_like("w_hr", w_hr, (copies * state_size, hidden_size), output)
    _check_like("gate", gate, (rows,), output)
    for name, tensor in {**kept, **of_rows}.items():
        columns = width.get(name.removesuffix("_t"), state_size)
        _check_like(name, tensor, (rows, columns), output)
    for name, tensor in of_sequences.items():
        columns = hidden_size if name.startswith(("c", "d_c")) else state_size
        _check_like(name, tensor, (batch, columns), output)


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
    check_given(pre=pre)
    layer = (output, c, gates, before, gate, w_hh, w_hr, batch_sizes, T, cell)
    _check_steps(layer, {"pre": pre, "projected": projected}, {"hx_t": hx_t, "cx_t": cx_t})
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
    layer = (output, c, gates, before, gate, w_hh, w_hr, batch_sizes, T, cell)
    of_rows = {"d_output": d_output, "d_output_t": d_output_t, "output_t": output_t}
    of_sequences = {"d_h_n": d_h_n, "d_h_n_t": d_h_n_t}
    if cell == "lstm":
        of_rows["c_t"] = c_t
        of_sequences |= {"d_c_n": d_c_n, "d_c_n_t": d_c_n_t}
    if GATES.get(cell, 1) > 1:
        of_rows |= {"gates_t": gates_t, "before_t": before_t}
    _check_steps(layer, of_rows, of_sequences, copies=2)
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
