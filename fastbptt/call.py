"""One call of a network: what was given, normalised and checked once, and its way to the operator.

A module (or a functional form) makes the record; boundaries, autocast and the operator read it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import is_tensor_like

from fastbptt import _C, _cell_network, autocast, onnx, ops
from fastbptt._options import Options
from fastbptt.boundaries import Boundaries, batch_of, boundaries_of
from fastbptt.truncation import Truncation

# The dtypes that have kernels, by device. The meta device has the operators' fakes.
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
KERNEL_DTYPES = {"cpu": DTYPES, "meta": DTYPES, "cuda": DTYPES if _C.cuda_built() else ()}
_NO_BOUNDARIES = Boundaries()


class Call:
    """What a network is called with.

    Attributes:
        net: what does not change from call to call: ``bias``, ``num_layers``, ``bidirectional``,
            ``batch_first`` and ``recompute``; a module or a functional form's description.
        cell: the operators' name of the cell.
        input: [T, B, I], [B, T, I] with ``batch_first``, or packed [N, I].
        states: h, or h and c, [num_layers * directions, B, ...] in the order of input's rows; or
            None for zeros.
        weights: of all layers and directions, in torch.nn's order.
        truncation: where the backward pass is cut.
        resets: as given: bool [T], [T, B], or [B, T] with ``batch_first``.
        packed: the PackedSequence that input is the data of, or None.
        unbatched: the call had no batch; B is 1 here.
        dropout: probability between layers, 0 outside training.
        options: what else is asked for, or None.
    """

    __slots__ = (
        "net",
        "cell",
        "input",
        "states",
        "weights",
        "truncation",
        "resets",
        "packed",
        "unbatched",
        "dropout",
        "options",
    )

    def __init__(
        self,
        net: Any,
        cell: str,
        input: Tensor,
        states: tuple[Tensor, ...] | None,
        weights: list[Tensor],
        truncation: Truncation | None,
        resets: Tensor | None,
        packed: PackedSequence | None = None,
        unbatched: bool = False,
        dropout: float = 0.0,
        options: Options | None = None,
    ):
        self.net = net
        self.cell = cell
        self.input = input
        self.states = states
        self.weights = weights
        self.truncation = truncation
        self.resets = resets
        self.packed = packed
        self.unbatched = unbatched
        self.dropout = dropout
        self.options = options

    @property
    def batch_sizes(self) -> Tensor | None:
        """The rows of each step of a packed input, [T] on the CPU."""
        return None if self.packed is None else self.packed.batch_sizes

    @property
    def batch_first(self) -> bool:
        """Whether the batch leads in ``input``: a packed one has one layout."""
        return self.net.batch_first and self.packed is None


def call_of_module(
    module: torch.nn.RNNBase,
    input: Tensor | PackedSequence,
    states: tuple[Tensor, ...] | None,
    truncation: Truncation | None,
    resets: Tensor | None,
    options: Options | None = None,
) -> Call:
    """Normalises what a module is called with, and checks all but truncation, resets and options.

    Args:
        module: one of fastbptt's.
        input, resets: as the module's ``forward`` takes them.
        states: the initial states as a tuple, or None.
        truncation: what ``as_truncation`` gave.
        options: what ``options_of`` gave.

    Raises:
        TypeError, ValueError, RuntimeError: as torch.nn's module.
    """
    for state in states or ():
        if not isinstance(state, Tensor) and not is_tensor_like(state):
            raise TypeError(f"hx must hold a Tensor for each state, got {type(state).__name__}")
    packed, unbatched = None, False
    if isinstance(input, PackedSequence):
        packed, input = input, input.data
        if states is not None and packed.sorted_indices is not None:
            states = tuple(state.index_select(1, packed.sorted_indices) for state in states)
        sizes = input.shape
    elif isinstance(input, Tensor) or is_tensor_like(input):
        sizes = input.shape
        dims = len(sizes)
        if dims == 2:
            if states is not None:
                _check_dims(dims, states)
                states = tuple(state.unsqueeze(1) for state in states)
            unbatched = True
            input = input.unsqueeze(0 if module.batch_first else 1)
            sizes = input.shape
        elif dims != 3:
            raise ValueError(
                f"{type(module).__name__}: Expected input to be 2D or 3D, got {dims}D tensor "
                "instead"
            )
    else:
        raise TypeError(f"input must be a Tensor or a PackedSequence, got {type(input).__name__}")
    weights = module._weights()
    dtype = weights[0].dtype  # the common case of each check need not take long
    if packed is not None or input.dtype != dtype or sizes[-1] != module.input_size:
        _check_input(module, input, packed, dtype)
    if states is not None:
        _check_states(module, sizes, packed, states)
    dropout = module.dropout if module.training else 0.0
    rest = (packed, unbatched, dropout, options)
    return Call(module, module._cell, input, states, weights, truncation, resets, *rest)


def _check_dims(dims: int, states: tuple[Tensor, ...]) -> None:
    if any(state.dim() != dims for state in states):
        kind = "batched 3-D" if dims == 3 else "unbatched 2-D"
        got = ", ".join(f"{state.dim()}-D" for state in states)
        names = " and ".join(("hx", "cx")[: len(states)])
        raise RuntimeError(
            f"For {kind} input, {names} should also be {dims}-D but got {got} tensor"
        )


def check_lstm_states(hx: object, *, packed: bool = False) -> None:
    """Refuses what is no pair of states, with the exception types of torch.nn.LSTM."""
    wanted = "hx must be None or a pair of Tensors (h_0, c_0), got"
    if isinstance(hx, Tensor):
        error = TypeError if packed else RuntimeError
        raise error(f"{wanted} one Tensor of shape {tuple(hx.shape)}")
    if hx is not None and not isinstance(hx, tuple | list):
        raise TypeError(f"{wanted} {type(hx).__name__}")
    if hx is not None and len(hx) != 2:
        error = TypeError if len(hx) < 2 else RuntimeError
        raise error(f"{wanted} {len(hx)} of them")


def _check_input(
    module: torch.nn.RNNBase,
    input: Tensor,
    packed: PackedSequence | None,
    weight_dtype: torch.dtype,
) -> None:
    # As RNNBase.check_input, which asks weights that functional_call may have replaced.
    if input.dtype != weight_dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight_dtype}). "
            f"Convert input: input.to({weight_dtype}), "
            f"or convert model: model.to({input.dtype})"
        )
    expected_dims = 3 if packed is None else 2
    if input.dim() != expected_dims:
        raise RuntimeError(f"input must have {expected_dims} dimensions, got {input.dim()}")
    if input.shape[-1] != module.input_size:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {module.input_size}, got {input.size(-1)}"
        )


def _check_states(
    module: torch.nn.RNNBase,
    sizes: torch.Size,
    packed: PackedSequence | None,
    states: tuple[Tensor, ...],
) -> None:
    layers = module.num_layers * (2 if module.bidirectional else 1)
    batch = sizes[0 if module.batch_first else 1] if packed is None else batch_of(packed)
    if batch is None:
        batch = states[0].shape[1]
    of_h = of_c = (layers, batch, module.hidden_size)
    if module.proj_size:
        of_h = (layers, batch, module.proj_size)
    if states[0].shape == of_h and all(state.shape == of_c for state in states[1:]):
        return  # the common case
    if packed is None:
        _check_dims(3, states)
    if len(states) == 1:
        return module.check_hidden_size(states[0], of_h)
    for i, state in enumerate(states):
        wanted = of_c if i else of_h
        module.check_hidden_size(state, wanted, f"Expected hidden[{i}] size {{}}, got {{}}")


def run(call: Call, network: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None) -> tuple:
    """Runs a module's call: by the kernels, or by torch where there is none.

    Args:
        call: with what.
        network: what computes in place of the operator of that name, with its arguments.

    Returns:
        The output in the layout of what was given, and the final states; with ``return_states``
        also every state of every step, [num_layers * directions, ...] each.

    Raises:
        TypeError, ValueError: truncation or resets do not fit the input.
        NotImplementedError: there is no kernel, and torch has no such nonlinearity, truncation or
            resets.
    """
    module, packed = call.net, call.packed
    if needs_cells(call):
        return _cell_network.run_module(call)
    if has_kernel(call.input):
        as_torchs = autocast.enter(call) if torch._C._is_any_autocast_enabled() else None
        results = run_network(call, network)
        if as_torchs is not None:
            results = as_torchs(*results)
        output, states = results[0], results[1:] if module.mode == "LSTM" else results[1:2]
    else:
        output, states = _by_torch(call)
    if packed is not None:
        if packed.unsorted_indices is not None:
            states = tuple(state.index_select(1, packed.unsorted_indices) for state in states)
        output = PackedSequence(output, *packed[1:])
    elif call.unbatched:
        output = output.squeeze(0 if module.batch_first else 1)
        states = tuple(state.squeeze(1) for state in states)
    if call.options is None:
        return output, states
    data = output if packed is None else output.data
    directions = 2 if module.bidirectional else 1
    every = data.unflatten(-1, (directions, -1))
    return output, states, (every.movedim(data.dim() - 1, 0),)  # ONNX Runtime takes no -2


def needs_cells(call: Call) -> bool:
    """Whether a call asks for what the built-in kernels have not; then its cell runs by itself.

    They give the states of a layer that are its output.
    """
    if call.options is None:
        return False
    only_states = call.options.reset_to is None and call.options.clip_grad is None
    return not only_states or call.net.num_layers > 1 or call.cell == "lstm"


def has_kernel(input: Tensor) -> bool:
    """Whether there are kernels for input's dtype and device, under autocast if that is on."""
    device = "cpu" if input.is_cpu else input.device.type  # is_cpu takes less time
    return input.dtype in KERNEL_DTYPES.get(device, ()) and (
        device in autocast.DEVICES or not torch._C._is_any_autocast_enabled()
    )


def run_network(
    call: Call, network: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's results for a call: output, h_n, and c_n (empty unless it is an LSTM)."""
    net, states, packed = call.net, call.states, call.packed
    bounds = _NO_BOUNDARIES
    if call.truncation is not None or call.resets is not None:
        if onnx.is_exporting():
            onnx.check(call)
        else:
            bounds = boundaries_of(call)
    return (network or ops.network)(
        call.input,
        None if states is None else states[0],
        states[1] if states is not None and len(states) == 2 else None,
        call.weights,
        net.bias,
        net.num_layers,
        net.bidirectional,
        None if packed is None else packed.batch_sizes,
        net.batch_first and packed is None,
        call.cell,
        call.dropout,
        bounds.k1,
        bounds.k2,
        bounds.last_only,
        net.recompute,
        bounds.resets,
        bounds.kappa,
    )


def _by_torch(call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
    """torch.nn's own computation, where there is no kernel: slower, and without truncation."""
    module, input, states = call.net, call.input, call.states
    name = type(module).__name__
    where = f"{str(input.dtype).removeprefix('torch.')} on {input.device.type}"
    if torch._C._is_any_autocast_enabled():
        where += " under autocast"
    if call.truncation is not None:
        raise NotImplementedError(
            f"fastbptt.{name}: truncation={call.truncation} has no kernel for {where}"
        )
    if call.resets is not None:
        raise NotImplementedError(f"fastbptt.{name}: resets have no kernel for {where}")
    if call.cell not in onnx.TORCH_FUNCTIONS:
        raise NotImplementedError(
            f"fastbptt.{name}: nonlinearity={call.cell!r} has no kernel for {where}"
        )
    warnings.warn(
        f"fastbptt.{name} has no kernel for {where}: torch.nn.{name} computes instead",
        stacklevel=6,  # the caller's line, beyond Module.__call__
    )
    if states is None:
        shape = module.get_expected_hidden_size(input, call.batch_sizes)
        shapes = (shape, (*shape[:2], module.hidden_size))[: 2 if module.mode == "LSTM" else 1]
        states = tuple(input.new_zeros(shape) for shape in shapes)
    options = (
        call.weights,
        module.bias,
        module.num_layers,
        module.dropout,
        module.training,
        module.bidirectional,
    )
    initial = states if len(states) == 2 else states[0]
    compute = onnx.TORCH_FUNCTIONS[call.cell]
    if call.packed is None:
        output, *final_states = compute(input, initial, *options, module.batch_first)
    else:
        output, *final_states = compute(input, call.batch_sizes, initial, *options)
    return output, tuple(final_states)
