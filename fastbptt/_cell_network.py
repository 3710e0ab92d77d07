"""A call of a network whose layers are run one by one: each a cell, by loops over its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastbptt import autocast, cells, onnx
from fastbptt._layouts import run_layout
from fastbptt._loops import stack_layers, unroll
from fastbptt._options import reset_states, sizes_of
from fastbptt._recurrence import unroll_of
from fastbptt.boundaries import boundaries_of
from fastbptt.cell import Cell, cell
from fastbptt.reference import lstm_cell
from fastbptt.truncation import Randomized, Windowed

if TYPE_CHECKING:
    from fastbptt.call import Call

States = tuple[Tensor, ...]


@cell(gates=1, states=1)
def _rectified(pre: States, rec: States, state: States) -> States:
    return (torch.relu(pre[0] + rec[0]),)


@cell(gates=1, states=1)
def _identity(pre: States, rec: States, state: States) -> States:
    return (pre[0] + rec[0],)


# The cells of the modules, by the operators' names.
CELLS: dict[str, Cell] = {
    "tanh": cells.elman,
    "relu": _rectified,
    "identity": _identity,
    "gru": cells.gru,
    "lstm": cells.lstm,
}


class Layers(NamedTuple):
    """What computes the layers of a call.

    Attributes:
        step: step(x, states, *weights, *inputs) -> the next states.
        weights: for each layer and direction, in order.
        widths: the features of each state.
        inputs: what ``step`` takes at each step, [T, B, L*D, ...], in the caller's order of
            sequences.
        output: the number of the state that is a layer's output.
        cell, names: what ``step`` is made of, and its arguments in the order in which it takes
            them: compiled, it may run in the place of ``step``.
    """

    step: Callable[..., States]
    weights: Sequence[Sequence[Tensor | None]]
    widths: tuple[int, ...]
    inputs: tuple[Tensor, ...] = ()
    output: int = 0
    cell: Cell | None = None
    names: tuple[str, ...] = ()


def run_layers(call: Call, layers: Layers) -> tuple:
    """Runs a call by its layers.

    Returns:
        The output in the layout of what was given and the final states, and with
        ``return_states`` every state of every step, [num_layers * directions, ...] each.

    Raises:
        TypeError, ValueError: truncation, resets or ``reset_to`` do not fit the input.
        RuntimeError: input has no steps.
    """
    net, options = call.net, call.options
    steps, batch = sizes_of(call)
    if steps == 0:
        raise RuntimeError("input must have at least 1 step, got 0")
    if isinstance(call.truncation, Randomized):
        call.truncation = call.truncation.draw_for_call(steps, batch)
    if call.truncation is not None or call.resets is not None:
        boundaries_of(call)  # for its errors
    weight, count = call.weights[0], len(layers.weights)
    input, states = _as_given(call)
    if states is None:
        sizes = (count,) if call.unbatched else (count, batch)
        states = tuple(weight.new_zeros(*sizes, width) for width in layers.widths)
    run_layer = unroll
    if layers.cell is not None:
        run_layer = unroll_of(layers.cell, layers.names, call.input)
    directions = 2 if net.bidirectional else 1
    width = directions * layers.widths[layers.output]
    by_rows = run_layer is not unroll
    wants_states = options is not None and options.return_states
    # Where one run is not all, the states go through what puts the outputs of several together.
    at_once = not _has_windows(call) and (by_rows or call.packed is None)
    every: list[States] = []
    output, final = run_layout(
        partial(
            stack_layers,
            layers.step,
            layers.weights,
            directions,
            output_state=layers.output,
            with_states=wants_states and not at_once,
            states_to=every if wants_states and at_once else None,
            unroll=run_layer,
        ),
        input,
        states,
        call.truncation,
        call.resets,
        _dropout_masks(call, input, width),
        layers.inputs,
        reset_to=() if options is None else reset_states(call, layers.widths, weight.dtype),
        clip_grad=None if options is None else options.clip_grad,
        batch_first=net.batch_first,
        bidirectional=net.bidirectional,
        by_rows=by_rows,
    )
    if not wants_states:
        return output, final
    if at_once:
        states = tuple(torch.stack(of_all) for of_all in zip(*every, strict=True))
        if call.unbatched:
            states = tuple(state.squeeze(2) for state in states)
        elif call.batch_first:
            states = tuple(state.transpose(1, 2) for state in states)
        return output, final, states
    data = output.data if isinstance(output, PackedSequence) else output
    own, *parts = data.split([width, *(count * each for each in layers.widths)], -1)
    if isinstance(output, PackedSequence):
        own = PackedSequence(own, *output[1:])
    return own, final, tuple(part.unflatten(-1, (count, -1)).movedim(-2, 0) for part in parts)


def _has_windows(call: Call) -> bool:
    """Whether the outputs of a call are those of several windows, or of some of their steps."""
    cut = call.truncation
    return isinstance(cut, Windowed) and (cut.k1 < cut.k2 or cut.last_only)


def _as_given(call: Call) -> tuple[Tensor | PackedSequence, States | None]:
    """A call's input and states in the layout of the module's call."""
    packed, states = call.packed, call.states
    if packed is not None:
        if states is not None and packed.unsorted_indices is not None:
            states = tuple(state.index_select(1, packed.unsorted_indices) for state in states)
        return PackedSequence(call.input, *packed[1:]), states
    if not call.unbatched:
        return call.input, states
    states = None if states is None else tuple(state.squeeze(1) for state in states)
    return call.input.squeeze(0 if call.net.batch_first else 1), states


def _dropout_masks(call: Call, input: Tensor | PackedSequence, width: int) -> tuple[Tensor, ...]:
    if call.dropout == 0:
        return ()
    rows = (input.data if isinstance(input, PackedSequence) else input).shape[:-1]
    ones = call.weights[0].new_ones(*rows, width)
    return tuple(
        torch.nn.functional.dropout(ones, call.dropout) for _ in range(call.net.num_layers - 1)
    )


def run_module(call: Call) -> tuple:
    """A built-in module's call with options, by the cell of the same name; as :func:`run_layers`.

    Raises:
        NotImplementedError: an ONNX exporter is at work, which knows no such thing.
    """
    net = call.net
    if onnx.is_exporting():
        raise NotImplementedError(
            f"{call.options.names()} cannot be exported: ONNX's recurrent operators have no such "
            "thing"
        )
    as_torchs = autocast.enter(call) if torch._C._is_any_autocast_enabled() else None
    each = len(call.weights) // (net.num_layers * (2 if net.bidirectional else 1))
    groups = [call.weights[i : i + each] for i in range(0, len(call.weights), each)]
    if not net.bias:
        groups = [[*group[:2], None, None, *group[2:]] for group in groups]
    widths = (net.proj_size or net.hidden_size, net.hidden_size)[: 2 if call.cell == "lstm" else 1]
    layers = Layers(lstm_cell, groups, widths)
    if net.proj_size == 0:
        cell = CELLS[call.cell]
        layers = layers._replace(step=partial(cell.step, ()), cell=cell)
    results = run_layers(call, layers)
    return results if as_torchs is None else _cast(results, as_torchs)


def _cast(results: tuple, as_torchs: Callable[..., States]) -> tuple:
    """Results in the dtypes that torch.nn's have under autocast."""
    output, *states = results
    is_packed = isinstance(output, PackedSequence)
    of_h = as_torchs(output.data if is_packed else output, *(states[0] * 2)[:2])[0]
    output = PackedSequence(of_h, *output[1:]) if is_packed else of_h
    return output, *(as_torchs(each[0], *(each * 2)[:2])[1 : 1 + len(each)] for each in states)
