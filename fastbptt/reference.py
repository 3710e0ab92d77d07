"""The truth: every recurrence as a plain loop over time, with ordinary autograd.

Slow and obvious, for any dtype and device. Nothing here shares code with the fused kernels, so
that the two can be held against each other. A step is one cell function; :func:`_unroll` carries
the state through time and cuts the gradient, and knows nothing of the cell's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastbptt.truncation import Truncation, as_truncation

__all__ = ["rnn", "rnn_cell", "run"]

Cell = Callable[..., Tensor]  # cell(x, h, *weights) -> the next h

_PHI = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda pre: pre}


def rnn_cell(
    x: Tensor,
    h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step of the Elman cell: x [B, I], h [B, H] -> h' [B, H].

    pre = W_ih x + b_ih + W_hh h + b_hh
    h'  = phi(pre)                        phi: tanh | relu | identity
    """
    pre = x @ weight_ih.T + h @ weight_hh.T
    if bias_ih is not None:
        pre = pre + bias_ih
    if bias_hh is not None:
        pre = pre + bias_hh
    return _PHI[nonlinearity](pre)


def _unroll(
    cell: Cell,
    input: Tensor,
    h: Tensor,
    weights: Sequence[Tensor | None],
    truncation: Truncation | None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One layer in one direction: input [T, B, I], h [B, H] -> all states [T, B, H], the last.

    The gradient is cut where the state crosses t = k, 2k, ..., from step t - 1 to step t or, in
    reverse, from step t to step t - 1.
    """
    T = input.size(0)
    states: list[Tensor] = []
    for t in reversed(range(T)) if reverse else range(T):
        crossed = t + 1 if reverse else t  # the place in time between the last step and this one
        if truncation is not None and 0 < crossed < T and crossed % truncation.k == 0:
            h = h.detach()
        h = cell(input[t], h, *weights)
        states.append(h)
    if reverse:
        states.reverse()
    return torch.stack(states), h


def _stack(
    cell: Cell,
    input: Tensor,
    hx: Tensor,
    weights: Sequence[Sequence[Tensor | None]],
    directions: int,
    truncation: Truncation | None,
) -> tuple[Tensor, Tensor]:
    """All layers: input [T, B, I], hx [L*D, B, H] -> output [T, B, D*H], h_n [L*D, B, H].

    ``weights`` holds one sequence for each layer and direction, in the order of ``hx``.
    """
    finals = []
    for layer in range(len(weights) // directions):
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            states, last = _unroll(cell, input, hx[i], weights[i], truncation, direction == 1)
            outputs.append(states)
            finals.append(last)
        input = torch.cat(outputs, dim=-1)  # the next layer sees both directions, side by side
    return input, torch.stack(finals)


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
        hx = input.new_zeros(*input.shape[1:-1], weight_hh.size(0))
    cell = partial(rnn_cell, nonlinearity=nonlinearity)
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    return _unroll(cell, input, hx, weights, as_truncation(truncation))


def run(
    module: torch.nn.RNNBase,
    input: Tensor | PackedSequence,
    hx: Tensor | None = None,
    *,
    truncation: Truncation | int | None = None,
) -> tuple[Tensor | PackedSequence, Tensor]:
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
    if not module.mode.startswith("RNN"):
        raise ValueError(f"module must be an RNN, got {type(module).__name__}")
    cell = partial(rnn_cell, nonlinearity=module.nonlinearity)
    directions = 2 if module.bidirectional else 1
    stack = partial(
        _stack,
        cell,
        weights=module.all_weights,
        directions=directions,
        truncation=as_truncation(truncation),
    )

    def zeros(*batch: int) -> Tensor:
        like = input.data if isinstance(input, PackedSequence) else input
        return like.new_zeros(module.num_layers * directions, *batch, module.hidden_size)

    if isinstance(input, PackedSequence):
        return _run_packed(stack, input, zeros(int(input.batch_sizes[0])) if hx is None else hx)
    if input.dim() == 2:  # unbatched: a batch of one
        hx = zeros() if hx is None else hx
        output, h_n = stack(input.unsqueeze(1), hx.unsqueeze(1))
        return output.squeeze(1), h_n.squeeze(1)
    if module.batch_first:
        input = input.transpose(0, 1)
    output, h_n = stack(input, zeros(input.size(1)) if hx is None else hx)
    return output.transpose(0, 1) if module.batch_first else output, h_n


def _run_packed(
    stack: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], input: PackedSequence, hx: Tensor
) -> tuple[PackedSequence, Tensor]:
    """Every sequence by itself, as a batch of one: what packing means, without its tricks."""
    data, batch_sizes, sorted_indices, unsorted_indices = input
    if sorted_indices is not None:  # hx comes in the caller's order, data lies sorted by length
        hx = hx.index_select(1, sorted_indices)

    # Step t of sequence b is row starts[t] + b of data, as long as the sequence lasts.
    sizes = batch_sizes.tolist()
    starts = [sum(sizes[:t]) for t in range(len(sizes))]
    all_rows, outputs, finals = [], [], []
    for b in range(sizes[0]):
        rows = [start + b for start, size in zip(starts, sizes, strict=True) if b < size]
        output, h_n = stack(data[rows].unsqueeze(1), hx[:, b : b + 1])
        all_rows += rows
        outputs.append(output.squeeze(1))
        finals.append(h_n)

    back = torch.tensor(all_rows, device=data.device).argsort()  # from sequence by sequence to data
    output = PackedSequence(torch.cat(outputs)[back], batch_sizes, sorted_indices, unsorted_indices)
    h_n = torch.cat(finals, dim=1)
    return output, h_n if unsorted_indices is None else h_n.index_select(1, unsorted_indices)
