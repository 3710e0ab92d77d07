"""One layer in one direction as a function of its weights."""

from __future__ import annotations

from torch import Tensor

from fastbptt import autograd
from fastbptt.truncation import Truncation, as_truncation

__all__ = ["rnn"]


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
    """An Elman layer: h_t = phi(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).

    Args:
        input: [T, B, I], or [T, I] for one sequence; float32 or float64, on the CPU.
        hx: initial state [B, H], or [H] for one sequence; zeros if None.
        weight_ih, weight_hh: [H, I] and [H, H].
        bias_ih, bias_hh: [H] each; both or neither.
        nonlinearity: phi, "tanh", "relu" or "identity".
        truncation: where the backward pass is cut: None, an int k, or a truncation object.

    Returns:
        output: [T, B, H] (or [T, H]), the states of all steps.
        h_n: [B, H] (or [H]), the last of them.

    Raises:
        ValueError: ``input`` has neither 2 nor 3 dimensions, or only one bias is given.
        RuntimeError: a shape, dtype, device or the nonlinearity is not as above.
        NotImplementedError: there is no kernel for the dtype or device.
    """
    dims = input.dim()
    if dims not in (2, 3):
        raise ValueError(f"input must have 2 or 3 dimensions, got {dims}")
    if (bias_ih is None) != (bias_hh is None):
        missing = "bias_hh" if bias_hh is None else "bias_ih"
        raise ValueError(f"bias_ih and bias_hh must both be given or both be None; {missing} is")
    if hx is not None and hx.dim() != dims - 1:
        raise RuntimeError(
            f"hx must have {dims - 1} dimensions for a {dims}-D input, got {hx.dim()}"
        )
    cut = as_truncation(truncation)
    net = autograd.Network(
        num_layers=1,
        directions=1,
        has_biases=bias_ih is not None,
        batch_first=False,
        nonlinearity=nonlinearity,
        dropout=0.0,
        chunk=0 if cut is None else cut.k,
    )
    weights = [weight_ih, weight_hh]
    if bias_ih is not None and bias_hh is not None:
        weights += [bias_ih, bias_hh]
    batched = dims == 3
    output, h_n = autograd.run(
        net,
        input if batched else input.unsqueeze(1),
        None if hx is None else hx.unsqueeze(0) if batched else hx[None, None],
        None,
        weights,
    )
    return (output, h_n[0]) if batched else (output.squeeze(1), h_n[0, 0])
