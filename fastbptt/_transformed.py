"""The operator ``network`` for torch.func's transforms and for forward-mode AD."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastbptt._derivatives import Network
from fastbptt._points import Net


def network(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_sizes: Tensor | None,
    batch_first: bool,
    cell: str,
    dropout: float,
    k1: int,
    k2: int,
    last_only: bool,
    recompute: bool,
    resets: Tensor | None,
    kappa: Tensor | None,
    *,
    function: type[Network] = Network,
    make_net: Callable[..., Net] = Net,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the operator; it takes more time, and keeps gates whatever ``recompute`` says.

    Args:
        function, make_net: what computes in place of these, of whose kinds they are.
    """
    net = make_net(
        has_biases,
        num_layers,
        bidirectional,
        batch_first,
        cell,
        k1,
        k2,
        last_only,
        len(weights),
    )
    masks = []
    if dropout > 0:
        width = weights[1].shape[1] * (2 if bidirectional else 1)
        masks = [_dropout_mask(input, width, dropout, batch_first) for _ in range(num_layers - 1)]
    results = function.apply(net, batch_sizes, resets, kappa, input, hx, cx, *weights, *masks)
    return results[:3]


def _dropout_mask(input: Tensor, width: int, probability: float, batch_first: bool) -> Tensor:
    """The operator's draw. Not of a tensor that vmap maps over, so that its randomness counts."""
    rows = input.shape[:-1]
    is_turned = batch_first and len(rows) == 2
    shape = (*(rows[::-1] if is_turned else rows), width)
    empty = torch.zeros(shape, dtype=input.dtype, device=input.device)
    if probability == 1:
        mask = empty
    else:
        mask = torch.bernoulli(empty, 1 - probability) / (1 - probability)
    return mask.transpose(0, 1) if is_turned else mask
