"""The truth: every recurrence as a plain loop over time, with ordinary autograd.

Slow and obvious, for any dtype and device. Nothing here shares code with the fused kernels, so
that the two can be held against each other. Here is the arithmetic of each cell, one step of it,
and the shapes that a call may have; the loops over time and layers are in ``_loops``, those over
windows in ``_layouts``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastbptt._layouts import by_step, run_layout, run_padded
from fastbptt._loops import Cell, States, stack_layers
from fastbptt.truncation import Truncation, as_truncation

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_cell", "run"]

_PHI = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda pre: pre}


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.T if bias is None else x @ weight.T + bias


def rnn_cell(
    x: Tensor,
    states: States,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> States:
    """One step of the Elman cell: x [B, I], states (h [B, H],) -> (h',).

    pre = W_ih x + b_ih + W_hh h + b_hh
    h'  = phi(pre)                        phi: tanh | relu | identity
    """
    (h,) = states
    pre = _linear(x, weight_ih, bias_ih) + _linear(h, weight_hh, bias_hh)
    return (_PHI[nonlinearity](pre),)


def gru_cell(
    x: Tensor,
    states: States,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> States:
    """One step of the gated recurrent unit: x [B, I], states (h [B, H],) -> (h',).

    r  = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
    z  = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
    n  = tanh(W_in x + b_in + r (W_hn h + b_hn))    the reset gate after the matrix product
    h' = (1 - z) n + z h
    """
    (h,) = states
    input_r, input_z, input_n = _linear(x, weight_ih, bias_ih).chunk(3, dim=-1)
    hidden_r, hidden_z, hidden_n = _linear(h, weight_hh, bias_hh).chunk(3, dim=-1)
    r = torch.sigmoid(input_r + hidden_r)
    z = torch.sigmoid(input_z + hidden_z)
    n = torch.tanh(input_n + r * hidden_n)
    return ((1 - z) * n + z * h,)


def lstm_cell(
    x: Tensor,
    states: States,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
) -> States:
    """One step of long short-term memory: x [B, I], states (h [B, R], c [B, H]) -> (h', c').

    i  = sigmoid(W_ii x + b_ii + W_hi h + b_hi)
    f  = sigmoid(W_if x + b_if + W_hf h + b_hf)
    g  = tanh(W_ig x + b_ig + W_hg h + b_hg)
    o  = sigmoid(W_io x + b_io + W_ho h + b_ho)
    c' = f c + i g
    h' = o tanh(c'),  or W_hr (o tanh(c')) with a projection; else R = H
    """
    h, c = states
    pre = _linear(x, weight_ih, bias_ih) + _linear(h, weight_hh, bias_hh)
    i, f, g, o = pre.chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return h if weight_hr is None else h @ weight_hr.T, c


def rnn(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    truncation: Truncation | int | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer of the Elman network in one direction, as :func:`fastbptt.rnn` defines it.

    Args:
        input: [T, B, I], or [T, I] without a batch.
        hx: the state before step 0, [B, H] or [H]; None stands for zeros.
        weight_ih, weight_hh: [H, I] and [H, H].
        bias_ih, bias_hh: [H] or None.
        nonlinearity: "tanh", "relu" or "identity".
        truncation: None, an int k, short for ``Chunked(k)``, or a truncation object.
        resets: [T, B] or [T], bool; True zeroes the state that enters a step.

    Returns:
        output [T, B, H] and h_n [B, H]; [T, H] and [H] without a batch.
    """
    cell = partial(rnn_cell, nonlinearity=nonlinearity)
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    states, sizes = None if hx is None else (hx,), (weight_hh.size(1),)
    output, (h_n,) = _layer(cell, input, states, weights, sizes, truncation, resets)
    return output, h_n


def gru(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    truncation: Truncation | int | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer of gated recurrent units in one direction, as :func:`fastbptt.gru` defines it.

    Args:
        input: [T, B, I], or [T, I] without a batch.
        hx: the state before step 0, [B, H] or [H]; None stands for zeros.
        weight_ih, weight_hh: [3H, I] and [3H, H], gates in the order r, z, n.
        bias_ih, bias_hh: [3H] or None.
        truncation: None, an int k, short for ``Chunked(k)``, or a truncation object.
        resets: [T, B] or [T], bool; True zeroes the state that enters a step.

    Returns:
        output [T, B, H] and h_n [B, H]; [T, H] and [H] without a batch.
    """
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    states, sizes = None if hx is None else (hx,), (weight_hh.size(1),)
    output, (h_n,) = _layer(gru_cell, input, states, weights, sizes, truncation, resets)
    return output, h_n


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    truncation: Truncation | int | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One layer of long short-term memory in one direction, as :func:`fastbptt.lstm` defines it.

    Args:
        input: [T, B, I], or [T, I] without a batch.
        hx: the states (h [B, R], c [B, H]) before step 0, without B if input is; None stands for
            zeros. R is H, or the size of the projection.
        weight_ih, weight_hh: [4H, I] and [4H, R], gates in the order i, f, g, o.
        bias_ih, bias_hh: [4H] or None.
        weight_hr: the projection [R, H], or None.
        truncation: None, an int k, short for ``Chunked(k)``, or a truncation object. It cuts h
            and c alike.
        resets: [T, B] or [T], bool; True zeroes the states that enter a step.

    Returns:
        output [T, B, R] and (h_n, c_n) like ``hx``; output [T, R] without a batch.
    """
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    states, sizes = None if hx is None else tuple(hx), (weight_hh.size(1), weight_hh.size(0) // 4)
    output, (h_n, c_n) = _layer(lstm_cell, input, states, weights, sizes, truncation, resets)
    return output, (h_n, c_n)


def _layer(
    cell: Cell,
    input: Tensor,
    states: States | None,
    weights: Sequence[Tensor | None],
    sizes: Sequence[int],
    truncation: Truncation | int | None,
    resets: Tensor | None,
) -> tuple[Tensor, States]:
    """One layer in one direction, with or without a batch; ``sizes`` are the states' features."""
    truncation = as_truncation(truncation)
    if states is None:
        states = tuple(input.new_zeros(*input.shape[1:-1], size) for size in sizes)
    is_batched = input.dim() == 3
    if not is_batched:
        input, states = input.unsqueeze(1), tuple(state.unsqueeze(0) for state in states)
    per_step = by_step(*input.shape[:2], truncation, resets, input.device)
    stack = partial(stack_layers, cell, [weights], 1)
    states = tuple(state.unsqueeze(0) for state in states)
    output, states = run_padded(stack, input, states, per_step, truncation)
    states = tuple(state.squeeze(0) for state in states)
    if is_batched:
        return output, states
    return output.squeeze(1), tuple(state.squeeze(0) for state in states)


def _cell_of(module: torch.nn.RNNBase) -> Cell:
    if module.mode in ("GRU", "LSTM"):
        return gru_cell if module.mode == "GRU" else lstm_cell
    if module.mode.startswith("RNN"):
        return partial(rnn_cell, nonlinearity=module.nonlinearity)
    raise ValueError(f"module must be an RNN, a GRU or an LSTM, got mode {module.mode!r}")


def _weights_of(module: torch.nn.RNNBase) -> list[list[Tensor | None]]:
    """For each layer and direction: w_ih, w_hh, b_ih, b_hh and, with a projection, w_hr."""
    if module.bias:
        return module.all_weights
    return [[w_ih, w_hh, None, None, *rest] for w_ih, w_hh, *rest in module.all_weights]


def run(
    module: torch.nn.RNNBase,
    input: Tensor | PackedSequence,
    hx: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    truncation: Truncation | int | None = None,
    resets: Tensor | None = None,
    dropout_masks: Sequence[Tensor] | None = None,
) -> tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, ...]]:
    """The whole stack of a recurrent module, fastbptt's or torch's, by plain loops.

    Takes and returns what the module's own ``forward`` does: padded, unbatched or packed. The
    truncation is the one given here; None means full backpropagation, whatever the module holds.

    Args:
        module: whose parameters and options count.
        input, hx, truncation, resets: as a call of :class:`fastbptt.RNN` or its siblings takes
            them.
        dropout_masks: what the output of each layer but the last is multiplied by, in the shape
            of ``output`` (of its data, if packed): 0, or 1 / (1 - p) where a value is kept.

    Raises:
        TypeError: ``truncation`` is no truncation, or ``resets`` not bool.
        ValueError: dropout is active (its mask is drawn inside the module, out of sight) and
            ``dropout_masks`` are not given, the module's cell is not known here, gates or resets
            have another shape, or windows overlap (k1 < k2) in a bidirectional module.
    """
    masks = tuple(dropout_masks or ())
    if not masks and module.dropout > 0 and module.training and module.num_layers > 1:
        raise ValueError(
            "module must have dropout 0 or be in eval mode, or dropout_masks be given, "
            f"got dropout {module.dropout}"
        )
    if masks and len(masks) != module.num_layers - 1:
        raise ValueError(f"dropout_masks must hold {module.num_layers - 1}, got {len(masks)}")
    truncation = as_truncation(truncation)
    stack = partial(
        stack_layers, _cell_of(module), _weights_of(module), 2 if module.bidirectional else 1
    )
    states = (hx,) if isinstance(hx, Tensor) else hx
    if states is None:
        states = _zeros(module, input)
    output, states = run_layout(
        stack,
        input,
        states,
        truncation,
        resets,
        masks,
        batch_first=module.batch_first,
        bidirectional=module.bidirectional,
    )
    return output, states if module.mode == "LSTM" else states[0]


def _zeros(module: torch.nn.RNNBase, input: Tensor | PackedSequence) -> States:
    """The states of a call that gives none: [L*D, B, ...], without B for an unbatched input."""
    if isinstance(input, PackedSequence):
        input, batch = input.data, (int(input.batch_sizes[0]),)
    else:
        batch = () if input.dim() == 2 else (input.size(0 if module.batch_first else 1),)
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = (module.proj_size or module.hidden_size, module.hidden_size)
    sizes = sizes if module.mode == "LSTM" else sizes[:1]
    return tuple(input.new_zeros(count, *batch, size) for size in sizes)
