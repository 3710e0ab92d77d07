"""The operator ``network_bwd``, which the network's node calls: derivatives, vmap, no data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastbptt import _C, _derivatives
from fastbptt._batching import apply_in_older_vmap, takes_older_vmap
from fastbptt._points import NOTHING, Net, network_bwd
from fastbptt.ops import check_known

_GRADS, _STATES, _BOUNDARIES = slice(0, 3), slice(3, 5), slice(5, 8)  # of the arguments
_WEIGHTS, _KEPT, _MASKS, _NET, _NEEDS = 8, 9, 10, slice(11, 19), 19


def _primals(arguments: Sequence[Any]) -> list[Any]:
    return [arguments[_KEPT][0], *arguments[_STATES], *arguments[_WEIGHTS]]


def _flat(arguments: Sequence[Any]) -> list[Any]:
    """The tensors, or what there is for each, in the order that Gradients takes them in."""
    count = 4  # of kept, by layer: input, output, c, gates
    kept = arguments[_KEPT]
    by_part = [tensor for part in range(1, count) for tensor in kept[part::count]]
    return [
        *arguments[_BOUNDARIES],
        *arguments[_GRADS],
        *_primals(arguments),
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


@torch.library.register_fake("fastbptt::network_bwd")
def _without_data(*arguments: Any) -> list[Tensor]:
    check_known(_C.check_network_bwd, *arguments)
    input = arguments[_KEPT][0]
    return [
        input.new_empty(of.shape if of is not None and is_needed else (0,))
        for of, is_needed in zip(_primals(arguments), arguments[_NEEDS], strict=True)
    ]


def _differentiable(*arguments: Any) -> list[Tensor]:
    """The kernel for autograd, and for forward-mode AD."""
    tensors = [*arguments[_GRADS], *_primals(arguments)]
    wants_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
    has_tangents = forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()
    if not wants_gradient and not has_tangents:
        with torch._C._AutoDispatchBelowAutograd():
            return network_bwd(*arguments)
    return _by_function(*arguments)


def _by_function(*arguments: Any) -> list[Tensor]:
    check_known(_C.check_network_bwd, *arguments)
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


@takes_older_vmap
def _second_of(net: Net, needs: Sequence[bool], *tensors: Any) -> tuple[Tensor | None, ...]:
    """The gradients of Gradients' results along cotangents, which come first among the tensors."""
    count = len(net.needs)
    point, grads = _derivatives.Gradients.read(net, *tensors[count:])
    of_results, of_primals = _derivatives._second(point, grads, NOTHING, tensors[:count], needs)
    return *of_results, *of_primals


def _twice(cotangents: Sequence[Tensor | None], *arguments: Any) -> list[Tensor]:
    """The kernel of network_bwd_bwd, whose arguments go on like network_bwd's."""
    grads, *rest, given, needs = arguments
    arguments = (*grads, *rest, given)
    results = _second_of(_net(arguments), needs, *cotangents, *_flat(arguments))
    empty = arguments[_KEPT][0].new_empty(0)
    return [empty if result is None else result for result in results]


def _twice_batched(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """The rule for vmap: one call after another."""
    leaves, spec = tree_flatten(arguments)
    dims = tree_flatten(in_dims, is_leaf=lambda dim: dim is None)[0]

    def call(v: int) -> list[Tensor]:
        own = (a if d is None else a.select(d, v) for a, d in zip(leaves, dims, strict=True))
        return _twice(*tree_unflatten(own, spec))

    with temporarily_pop_interpreter_stack():  # as for a Function's rule
        calls = [call(v) for v in range(info.batch_size)]
        results = [torch.stack(of_all) for of_all in zip(*calls, strict=True)]
    return results, [0] * len(results)


_library = torch.library.Library("fastbptt", "IMPL")
_library.impl("network_bwd_bwd", _twice, "CompositeImplicitAutograd")
_library.impl("network_bwd_bwd", _twice, "Batched")
torch.library.register_vmap("fastbptt::network_bwd_bwd", _twice_batched, lib=_library)
_library.impl("network_bwd", _differentiable, "Autograd")
_library.impl("network_bwd", _by_function, "Batched")  # torch.autograd's own vmap
torch.library.register_vmap("fastbptt::network_bwd", _batched, lib=_library)
