"""The derivatives and the vmap of the operator ``network_bwd``, which the network's node calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad

from fastbptt import _derivatives
from fastbptt._batching import apply_in_older_vmap
from fastbptt._points import Net, network_bwd

_GRADS, _STATES, _BOUNDARIES = slice(0, 3), slice(3, 5), slice(5, 8)  # of the arguments
_WEIGHTS, _KEPT, _MASKS, _NET, _NEEDS = 8, 9, 10, slice(11, 19), 19


def _flat(arguments: Sequence[Any]) -> list[Any]:
    """The tensors, or what there is for each, in the order that Gradients takes them in."""
    count = 4  # of kept, by layer: input, output, c, gates
    kept = arguments[_KEPT]
    by_part = [tensor for part in range(1, count) for tensor in kept[part::count]]
    primals = (kept[0], *arguments[_STATES], *arguments[_WEIGHTS])
    return [
        *arguments[_BOUNDARIES],
        *arguments[_GRADS],
        *primals,
        *by_part,
        *arguments[_MASKS],
    ]


def _net(arguments: Sequence[Any]) -> Net:
    has_biases, num_layers, bidirectional, batch_first, cell, k1, k2, last_only = arguments[_NET]
    return Net(
        has_biases,
        num_layers,
        bidirectional,
        batch_first,
        cell,
        k1,
        k2,
        last_only,
        len(arguments[_WEIGHTS]),
        tuple(arguments[_NEEDS]),
    )


def _all(results: Sequence[Any], needs: Sequence[bool], missing: Any) -> list[Any]:
    """The results that are needed, and for each other what stands for it."""
    given = iter(results)
    return [next(given) if is_needed else missing for is_needed in needs]


def _differentiable(*arguments: Any) -> list[Tensor]:
    """The kernel for autograd, and for forward-mode AD."""
    tensors = [*arguments[_GRADS], arguments[_KEPT][0], *arguments[_STATES], *arguments[_WEIGHTS]]
    wants_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
    has_tangents = forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()
    if not wants_gradient and not has_tangents:
        with torch._C._AutoDispatchBelowAutograd():
            return network_bwd(*arguments)
    return _by_function(*arguments)


def _by_function(*arguments: Any) -> list[Tensor]:
    net = _net(arguments)
    results = apply_in_older_vmap(_derivatives.Gradients, net, *_flat(arguments))
    return _all(results, net.needs, arguments[_KEPT][0].new_empty(0))


def _batched(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """The rule for vmap."""
    net = _net(arguments)
    tensors, dims = _flat(arguments), _flat(in_dims)
    with temporarily_pop_interpreter_stack():  # as for a Function's rule
        results, of_results = _derivatives.Gradients.vmap(info, (None, *dims), net, *tensors)
    missing = arguments[_KEPT][0].new_empty(0)
    return _all(results, net.needs, missing), _all(of_results, net.needs, None)


_library = torch.library.Library("fastbptt", "IMPL")
_library.impl("network_bwd", _differentiable, "Autograd")
_library.impl("network_bwd", _by_function, "Batched")  # torch.autograd's own vmap
torch.library.register_vmap("fastbptt::network_bwd", _batched, lib=_library)
