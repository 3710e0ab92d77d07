"""The operators, bound once, and what they return for tensors without data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbptt import _C  # noqa: F401  (loading it registers the operators)

rnn_fwd = torch.ops.fastbptt.rnn_fwd.default
rnn_bwd = torch.ops.fastbptt.rnn_bwd.default


@torch.library.register_fake("fastbptt::rnn_fwd")
def _(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    has_biases: bool,
    batch_sizes: Tensor | None,
    batch_first: bool,
    nonlinearity: str,
) -> tuple[Tensor, Tensor]:
    directions = len(weights) // (4 if has_biases else 2)
    hidden_size = weights[1].shape[1]
    if batch_sizes is None:
        batch = input.shape[0 if batch_first else 1]
    elif hx is not None:
        batch = hx.shape[1]
    else:
        batch = torch.library.get_ctx().new_dynamic_size()
    output = input.new_empty((*input.shape[:-1], directions * hidden_size))
    return output, input.new_empty((directions, batch, hidden_size))


@torch.library.register_fake("fastbptt::rnn_bwd")
def _(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    output: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    has_biases: bool,
    batch_sizes: Tensor | None,
    batch_first: bool,
    nonlinearity: str,
    chunk: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    def gradient(tensor: Tensor | None, needed: bool) -> Tensor:
        if tensor is None or not needed:
            return input.new_empty(0)
        return tensor.new_empty(tensor.shape)

    needs_input, needs_hx, needs_weights = needs
    return (
        gradient(input, needs_input),
        gradient(hx, needs_hx),
        [gradient(weight, needs_weights) for weight in weights],
    )
