"""The operators, bound once, and what they return for tensors without data."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from fastbptt import _C as _C  # loading it registers the operators
from fastbptt import _transformed, onnx
from fastbptt.truncation import _positive_int

# Looked up once: a short call asks all of them.
_is_compiling = torch.compiler.is_dynamo_compiling  # without dynamo, tensors are a tracer's
_has_function_mode = torch._C._is_torch_function_mode_enabled
_is_tracing = torch._C._is_tracing
_innermost_transform = torch._C._functorch.peek_interpreter_stack

_network = torch.ops.fastbptt.network.default  # made of the others, so it needs no fake
rnn_fwd = torch.ops.fastbptt.rnn_fwd.default
rnn_bwd = torch.ops.fastbptt.rnn_bwd.default
bernoulli_ = torch.ops.fastbptt.bernoulli_.default


def is_watched(input: Tensor) -> bool:
    """Whether somebody looks at a call's operators: a tracer, a transform, a mode, a subclass."""
    return (
        type(input) is not Tensor
        or _is_compiling()
        or _has_function_mode()
        or _innermost_transform() is not None
        or _is_tracing()
    )


def network(
    input: Tensor, hx: Tensor | None, cx: Tensor | None, *arguments: object
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator of that name; called directly where nobody watches operators: it is cheaper."""
    if (
        is_watched(input)
        or (hx is not None and type(hx) is not Tensor)
        or (cx is not None and type(cx) is not Tensor)
        or forward_ad._current_level >= 0
    ):
        if onnx.is_exporting():
            return onnx.network(input, hx, cx, *arguments)  # type: ignore[arg-type]
        if not (_is_compiling() or _is_tracing()) and (
            _innermost_transform() is not None or forward_ad._current_level >= 0
        ):
            return _transformed.network(input, hx, cx, *arguments)  # type: ignore[arg-type]
        return _network(input, hx, cx, *arguments)
    return _C.network(input, hx, cx, *arguments)


def get_workspace_limit() -> int:
    """The bytes that the windows of a truncated backward pass may take when they are stacked."""
    return _C.workspace_limit()


def set_workspace_limit(bytes: int) -> None:
    """Sets how much memory the windows of a backward pass may take at once.

    Truncations whose windows overlap (``TBPTT`` with k1 < k2, ``Sliding``) run their windows side
    by side, and need memory for each. Those that do not fit are taken in groups, one group after
    another; a group has at least one window. It holds for all threads, from the next backward
    pass on; the default is 256 MiB.

    Raises:
        TypeError: ``bytes`` is not an int.
        ValueError: ``bytes`` is less than 1.
    """
    _C.set_workspace_limit(min(_positive_int("bytes", bytes), 2**62))


GATES = {"tanh": 1, "relu": 1, "identity": 1, "gru": 3, "lstm": 4}


def num_sequences(
    batch_sizes: Tensor | None, if_uniform: int | torch.SymInt, *states: Tensor | None
) -> int | torch.SymInt:
    """B, of a padded input or a packed one; states [_, B, _], or None, may say it of a tracer's."""
    if batch_sizes is None:
        return if_uniform
    for state in states:
        if state is not None:
            return state.shape[1]
    if isinstance(batch_sizes, FakeTensor):  # it has no values to read
        return torch.library.get_ctx().new_dynamic_size()
    return int(batch_sizes[0])


def check_known(check: Callable[..., object], *arguments: object) -> None:
    """Lets the C++ check see them; not where sizes are symbols: a trace that asks holds for few."""
    tensors = (leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
    if not any(isinstance(size, torch.SymInt) for tensor in tensors for size in tensor.shape):
        check(*arguments)


def register_fake(
    name: str, *tensors: str, takes_symbols: bool = False
) -> Callable[[Callable[..., Any]], None]:
    """What an operator returns for tensors without data, after what it checks of its arguments.

    ``tensors`` must be there: the dispatcher lets None pass for a tensor, whatever the schema says.
    The C++ check may take no symbols, nor a tracer's batch sizes, which have no values to read.
    """
    check = getattr(_C, f"check_{name}")

    def register(results: Callable[..., Any]) -> None:
        signature = inspect.signature(results)

        def fake(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            for tensor in tensors:
                if given[tensor] is None:
                    raise RuntimeError(f"{tensor} must be a tensor")
            if takes_symbols:
                check(*given.values())
            elif not isinstance(given["batch_sizes"], FakeTensor):
                check_known(check, *given.values())
            return results(*given.values())

        torch.library.register_fake(f"fastbptt::{name}", fake)

    return register


@register_fake("rnn_fwd", "input", takes_symbols=True)
def _(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    has_biases: bool,
    batch_sizes: Tensor | None,
    batch_first: bool,
    cell: str,
    keep_gates: bool,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    directions = 2 if len(weights) >= 2 * (4 if has_biases else 2) else 1
    state_size = weights[1].shape[1]
    hidden_size = weights[1].shape[0] // GATES[cell]
    batch = num_sequences(batch_sizes, input.shape[0 if batch_first else 1], hx)
    rows = math.prod(input.shape[:-1])  # which keeps symbols, as Size.numel does not
    with_c = directions if cell == "lstm" else 0
    gated = GATES[cell] > 1
    return (
        input.new_empty((*input.shape[:-1], directions * state_size)),
        input.new_empty((directions, batch, state_size)),
        input.new_empty((with_c, batch, hidden_size)),
        input.new_empty((with_c, rows, hidden_size)),
        input.new_empty(
            (directions if gated and keep_gates else 0, rows, 4 * hidden_size if gated else 0)
        ),
    )


@register_fake("rnn_bwd", "input", "output", "c", "gates", takes_symbols=True)
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
    k1: int = 0,
    k2: int = 0,
    last_only: bool = False,
    resets: Tensor | None = None,
    kappa: Tensor | None = None,
    mask: Tensor | None = None,
    first_window: int = 0,
    num_windows: int = 0,
    grad_by_lane: bool = False,
    input_by_lane: bool = False,
    grad_network: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    def gradient(tensor: Tensor | None, needed: bool) -> Tensor:
        if tensor is None or not needed:
            return input.new_empty(0)
        return tensor.new_empty(tensor.shape)

    def input_gradient() -> Tensor:
        if input_by_lane:  # resets and losses decide how many rows
            rows = torch.library.get_ctx().new_dynamic_size()
            return input.new_empty((rows, input.shape[-1]))
        if num_windows == 0:
            return gradient(input, needs_input)
        shape = list(input.shape)
        if batch_sizes is None:
            time = 1 if batch_first else 0
            begin = max(0, first_window * k1 - (k2 - k1))
            shape[time] = min(shape[time], (first_window + num_windows) * k1) - begin
        else:  # it depends on the lengths
            shape[0] = torch.library.get_ctx().new_dynamic_size()
        return input.new_empty(shape)

    needs_input, needs_hx, needs_cx, needs_weights = needs
    return (
        input_gradient() if needs_input else input.new_empty(0),
        gradient(hx, needs_hx),
        gradient(cx, needs_cx),
        [gradient(weight, needs_weights) for weight in weights],
    )


@torch.library.register_fake("fastbptt::bernoulli_")
def _(
    self: Tensor, p: float, value: float = 1.0, *, generator: torch.Generator | None = None
) -> Tensor:
    return self
