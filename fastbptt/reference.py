"""The truth: every recurrence as a plain loop over time, with ordinary autograd.

Slow and obvious, for any dtype and device. Nothing here shares code with the fused kernels, so
that the two can be held against each other. A step is one cell function; :func:`_unroll` carries
the states through time and cuts the gradient, and knows nothing of the cell's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastbptt.truncation import Truncation, as_truncation

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell", "rnn", "rnn_cell", "run"]

States = tuple[Tensor, ...]  # what a cell hands to the next step: (h,) or (h, c)
Cell = Callable[..., States]  # cell(x, states, *weights) -> the next states

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


def _unroll(
    cell: Cell,
    input: Tensor,
    states: States,
    weights: Sequence[Tensor | None],
    truncation: Truncation | None,
    reverse: bool = False,
) -> tuple[Tensor, States]:
    """One layer in one direction: input [T, B, I], states [B, ...] -> all h [T, B, R], the last.

    The gradient is cut where the states cross t = k, 2k, ..., from step t - 1 to step t or, in
    reverse, from step t to step t - 1.
    """
    T = input.size(0)
    outputs: list[Tensor] = []
    for t in reversed(range(T)) if reverse else range(T):
        crossed = t + 1 if reverse else t  # the place in time between the last step and this one
        if truncation is not None and 0 < crossed < T and crossed % truncation.k == 0:
            states = tuple(state.detach() for state in states)
        states = cell(input[t], states, *weights)
        outputs.append(states[0])
    if reverse:
        outputs.reverse()
    return torch.stack(outputs), states


def _stack(
    cell: Cell,
    input: Tensor,
    states: States,
    weights: Sequence[Sequence[Tensor | None]],
    directions: int,
    truncation: Truncation | None,
) -> tuple[Tensor, States]:
    """All layers: input [T, B, I], states [L*D, B, ...] -> output [T, B, D*R], the last states.

    ``weights`` holds one sequence for each layer and direction, in the order of the states.
    """
    finals = []
    for layer in range(len(weights) // directions):
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            initial = tuple(state[i] for state in states)
            output, last = _unroll(cell, input, initial, weights[i], truncation, direction == 1)
            outputs.append(output)
            finals.append(last)
        input = torch.cat(outputs, dim=-1)  # the next layer sees both directions, side by side
    return input, tuple(torch.stack(of_all) for of_all in zip(*finals, strict=True))


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
) -> tuple[Tensor, Tensor]:
    """One layer of the Elman network in one direction, as :func:`fastbptt.rnn` defines it.

    Args:
        input: [T, B, I], or [T, I] without a batch.
        hx: the state before step 0, [B, H] or [H]; None stands for zeros.
        weight_ih, weight_hh: [H, I] and [H, H].
        bias_ih, bias_hh: [H] or None.
        nonlinearity: "tanh", "relu" or "identity".
        truncation: None, ``Chunked(k)``, or an int k, short for it.

    Returns:
        output [T, B, H] and h_n [B, H]; [T, H] and [H] without a batch.
    """
    if hx is None:
        hx = input.new_zeros(*input.shape[1:-1], weight_hh.size(1))
    cell = partial(rnn_cell, nonlinearity=nonlinearity)
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    output, (h_n,) = _unroll(cell, input, (hx,), weights, as_truncation(truncation))
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
) -> tuple[Tensor, Tensor]:
    """One layer of gated recurrent units in one direction, as :func:`fastbptt.gru` defines it.

    Args:
        input: [T, B, I], or [T, I] without a batch.
        hx: the state before step 0, [B, H] or [H]; None stands for zeros.
        weight_ih, weight_hh: [3H, I] and [3H, H], gates in the order r, z, n.
        bias_ih, bias_hh: [3H] or None.
        truncation: None, ``Chunked(k)``, or an int k, short for it.

    Returns:
        output [T, B, H] and h_n [B, H]; [T, H] and [H] without a batch.
    """
    if hx is None:
        hx = input.new_zeros(*input.shape[1:-1], weight_hh.size(1))
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    output, (h_n,) = _unroll(gru_cell, input, (hx,), weights, as_truncation(truncation))
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
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One layer of long short-term memory in one direction, as :func:`fastbptt.lstm` defines it.

    Args:
        input: [T, B, I], or [T, I] without a batch.
        hx: the states (h [B, R], c [B, H]) before step 0, without B if input is; None stands for
            zeros. R is H, or the size of the projection.
        weight_ih, weight_hh: [4H, I] and [4H, R], gates in the order i, f, g, o.
        bias_ih, bias_hh: [4H] or None.
        weight_hr: the projection [R, H], or None.
        truncation: None, ``Chunked(k)``, or an int k, short for it. It cuts h and c alike.

    Returns:
        output [T, B, R] and (h_n, c_n) like ``hx``; output [T, R] without a batch.
    """
    if hx is None:
        batch = input.shape[1:-1]
        h = input.new_zeros(*batch, weight_hh.size(1))
        hx = h, input.new_zeros(*batch, weight_hh.size(0) // 4)
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    output, (h_n, c_n) = _unroll(lstm_cell, input, tuple(hx), weights, as_truncation(truncation))
    return output, (h_n, c_n)


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
) -> tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, ...]]:
    """The whole stack of a recurrent module, fastbptt's or torch's, by plain loops.

    Takes and returns what the module's own ``forward`` does: padded, unbatched or packed. The
    truncation is the one given here; None means full backpropagation, whatever the module holds.

    Raises:
        ValueError: dropout is active (its mask is drawn inside the module, out of sight), or the
            module's cell is not known here.
    """
    if module.dropout > 0 and module.training:
        raise ValueError(
            f"module must have dropout 0 or be in eval mode, got dropout {module.dropout}"
        )
    stack = partial(
        _stack,
        _cell_of(module),
        weights=_weights_of(module),
        directions=2 if module.bidirectional else 1,
        truncation=as_truncation(truncation),
    )
    states = (hx,) if isinstance(hx, Tensor) else hx
    if states is None:
        states = _zeros(module, input)
    if isinstance(input, PackedSequence):
        output, states = _run_packed(stack, input, states)
    elif input.dim() == 2:  # unbatched: a batch of one
        output, states = stack(input.unsqueeze(1), tuple(state.unsqueeze(1) for state in states))
        output, states = output.squeeze(1), tuple(state.squeeze(1) for state in states)
    elif module.batch_first:
        output, states = stack(input.transpose(0, 1), states)
        output = output.transpose(0, 1)
    else:
        output, states = stack(input, states)
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


def _run_packed(
    stack: Callable[[Tensor, States], tuple[Tensor, States]], input: PackedSequence, states: States
) -> tuple[PackedSequence, States]:
    """Every sequence by itself, as a batch of one: what packing means, without its tricks."""
    data, batch_sizes, sorted_indices, unsorted_indices = input
    if sorted_indices is not None:  # states come in the caller's order, data lies by length
        states = tuple(state.index_select(1, sorted_indices) for state in states)

    # Step t of sequence b is row starts[t] + b of data, as long as the sequence lasts.
    sizes = batch_sizes.tolist()
    starts = [sum(sizes[:t]) for t in range(len(sizes))]
    all_rows, outputs, finals = [], [], []
    for b in range(sizes[0]):
        rows = [start + b for start, size in zip(starts, sizes, strict=True) if b < size]
        initial = tuple(state[:, b : b + 1] for state in states)
        output, last = stack(data[rows].unsqueeze(1), initial)
        all_rows += rows
        outputs.append(output.squeeze(1))
        finals.append(last)

    back = torch.tensor(all_rows, device=data.device).argsort()  # from sequence by sequence to data
    output = PackedSequence(torch.cat(outputs)[back], batch_sizes, sorted_indices, unsorted_indices)
    states = tuple(torch.cat(of_all, dim=1) for of_all in zip(*finals, strict=True))
    if unsorted_indices is not None:
        states = tuple(state.index_select(1, unsorted_indices) for state in states)
    return output, states
