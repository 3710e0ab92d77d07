"""One layer in one direction as a function of its weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastbptt.call import Call, check_lstm_states, run_network
from fastbptt.truncation import Truncation, as_truncation

__all__ = ["gru", "lstm", "rnn"]


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
    """An Elman layer: h_t = phi(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).

    Args:
        input: [T, B, I], or [T, I] for one sequence; float32, float64, bfloat16 or float16.
        hx: initial state [B, H], or [H] for one sequence; zeros if None.
        weight_ih, weight_hh: [H, I] and [H, H].
        bias_ih, bias_hh: [H] each; both or neither.
        nonlinearity: phi, "tanh", "relu" or "identity".
        truncation: where the backward pass is cut: None, an int k, or a truncation object.
        resets: bool [T, B] or [T]; where it is true the state that enters step t is zeros.

    Returns:
        output: [T, B, H] (or [T, H]), the states of all steps.
        h_n: [B, H] (or [H]), the last of them.

    Raises:
        TypeError, ValueError: ``truncation`` is no truncation or does not fit the input;
            ``resets`` is no bool tensor or does not fit.
        ValueError: ``input`` has neither 2 nor 3 dimensions, ``nonlinearity`` is not known, or
            only one bias is given.
        RuntimeError: a shape, dtype or device is not as above.
        NotImplementedError: there is no kernel for the dtype or device.
    """
    if nonlinearity not in ("tanh", "relu", "identity"):
        raise ValueError(f"nonlinearity must be 'tanh', 'relu' or 'identity', got {nonlinearity!r}")
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    output, h_n, _ = _run_layer(nonlinearity, input, (hx, None), weights, None, truncation, resets)
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
    """A layer of gated recurrent units, with the formulas of :class:`fastbptt.GRU`.

    Args:
        input: [T, B, I], or [T, I] for one sequence; float32, float64, bfloat16 or float16.
        hx: initial state [B, H], or [H] for one sequence; zeros if None.
        weight_ih, weight_hh: [3H, I] and [3H, H], gates in the order r, z, n.
        bias_ih, bias_hh: [3H] each; both or neither.
        truncation: where the backward pass is cut: None, an int k, or a truncation object.
        resets: bool [T, B] or [T]; where it is true the state that enters step t is zeros.

    Returns:
        output: [T, B, H] (or [T, H]), the states of all steps.
        h_n: [B, H] (or [H]), the last of them.

    Raises:
        As :func:`fastbptt.rnn`.
    """
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    output, h_n, _ = _run_layer("gru", input, (hx, None), weights, None, truncation, resets)
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
    """A layer of long short-term memory, with the formulas of :class:`fastbptt.LSTM`.

    Args:
        input: [T, B, I], or [T, I] for one sequence; float32, float64, bfloat16 or float16.
        hx: initial states (h_0 [B, R], c_0 [B, H]), without B for one sequence; zeros if None.
            R is H, or the projection's size.
        weight_ih, weight_hh: [4H, I] and [4H, R], gates in the order i, f, g, o.
        bias_ih, bias_hh: [4H] each; both or neither.
        weight_hr: [R, H], the projection of the state, or None.
        truncation: where the backward pass is cut: None, an int k, or a truncation object.
        resets: bool [T, B] or [T]; where it is true the state that enters step t is zeros.

    Returns:
        output: [T, B, R] (or [T, R]), the states h of all steps.
        (h_n, c_n): the last states, like ``hx``.

    Raises:
        As :func:`fastbptt.rnn`.
    """
    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    check_lstm_states(hx)
    states = (None, None) if hx is None else hx
    output, h_n, c_n = _run_layer("lstm", input, states, weights, weight_hr, truncation, resets)
    return output, (h_n, c_n)


class _Layer(NamedTuple):
    """The network of a functional form."""

    bias: bool
    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    recompute: bool = False


def _run_layer(
    cell: str,
    input: Tensor,
    states: tuple[Tensor | None, Tensor | None],
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    weight_hr: Tensor | None,
    truncation: Truncation | int | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dims = input.dim()
    if dims not in (2, 3):
        raise ValueError(f"input must have 2 or 3 dimensions, got {dims}")
    *_, bias_ih, bias_hh = weights
    if (bias_ih is None) != (bias_hh is None):
        missing = "bias_hh" if bias_hh is None else "bias_ih"
        raise ValueError(f"bias_ih and bias_hh must both be given or both be None; {missing} is")
    for name, state in zip(("hx", "cx"), states, strict=True):
        if state is None:
            if states[0] is not None and cell == "lstm":
                raise TypeError("hx must be None or a pair of Tensors (h_0, c_0), got c_0 = None")
        elif state.dim() != dims - 1:
            raise RuntimeError(
                f"{name} must have {dims - 1} dimensions for a {dims}-D input, got {state.dim()}"
            )
    single = dims == 2
    there = tuple(
        state[None, None] if single else state[None] for state in states if state is not None
    )
    call = Call(
        _Layer(bias_ih is not None),
        cell,
        input.unsqueeze(1) if single else input,
        there or None,
        [weight for weight in (*weights, weight_hr) if weight is not None],
        as_truncation(truncation),
        resets,
        unbatched=single,
    )
    output, h_n, c_n = run_network(call)
    output = output.squeeze(1) if single else output
    last = (0, 0) if single else (0,)
    return output, h_n[last], c_n[last] if cell == "lstm" else c_n
