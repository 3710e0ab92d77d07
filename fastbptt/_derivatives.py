"""Derivatives of a network, of any order and kind, by tangents.

F is the network and G its backward pass: G(g; p) are the gradients of the primals p (input, hx, cx,
weights) given g, those of the results. J(p; t) are the tangents of the results along those of the
primals, D(g, g'; p; t) those of the gradients. Then

    F has the gradient G, and the tangent J
    G has the gradients J(p; u) in g and D(g, 0; p; u) in p, and the tangent D
    J has the gradients G(v; p) in t and D(v, 0; p; t) in p

so that four Functions are enough for all first and second derivatives. A truncated network is the
sum of its windows, each run from a detached state, and its derivatives are this sum's: those of a
loop with ``detach`` and ``create_graph=True``. Third ones are plain PyTorch's, see ``_third``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastbptt import _batching, _third
from fastbptt._groups import by_group
from fastbptt._points import (
    NOTHING,
    Net,
    OptionalTensors,
    Point,
    apart_pass,
    forward_pass,
    in_dtype,
    network_bwd,
    second_pass,
)
from fastbptt._windows import windows_of

_HEAD = 4  # arguments of each Function in front of its own: net, batch_sizes, resets, kappa


def _are_there(tensors: OptionalTensors) -> bool:
    return any(tensor is not None for tensor in tensors)


def _some(values: OptionalTensors, needs: Sequence[bool]) -> tuple[Any, ...]:
    """Of the values for each primal those that are needed."""
    return tuple(value for value, is_needed in zip(values, needs, strict=True) if is_needed)


def _for_each(values: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """The inverse of _some, with None for the others."""
    given = iter(values)
    return [next(given) if is_needed else None for is_needed in needs]


class _Derivative(torch.autograd.Function):
    """What the Functions share: how arguments are laid out, what is saved, and vmap.

    Arguments: net, batch_sizes, resets, kappa; then ``parts``, one tensor or None after another:
    "results" (one for output, h_n and c_n), "primals" (one for input, hx, cx and each weight) or
    "kept"; then the dropout's masks.
    """

    parts: tuple[str, ...]
    has_groups = False  # whether it can keep sums over the batch apart

    @classmethod
    def split(cls, net: Net, arguments: Sequence[Any]) -> list[tuple[Any, ...]]:
        """What there is for each argument, as lists: for each part, and for the masks."""
        sizes = {"results": 3, "primals": 3 + net.num_weights, "kept": 3 * net.num_layers}
        lists, begin = [], _HEAD
        for part in cls.parts:
            lists.append(tuple(arguments[begin : begin + sizes[part]]))
            begin += sizes[part]
        return [*lists, tuple(arguments[begin:])]

    @classmethod
    def read(cls, net: Net, *tensors: Any) -> tuple[Any, ...]:
        """The point that the arguments give (nothing is kept there, if they do not), and the rest.

        The rest: the other parts in their order.
        """
        *lists, masks = cls.split(net, (net, *tensors))
        primals = lists.pop(cls.parts.index("primals"))
        kept = lists.pop() if cls.parts[-1] == "kept" else ()
        return Point(net, *tensors[: _HEAD - 1], primals, kept, masks), *lists

    @staticmethod
    def filled(ctx: Any, *lists: Sequence[Any]) -> tuple[Any, ...]:
        """The gradients of all arguments that need one, from those of the first parts."""
        given = [*[None] * _HEAD, *(each for values in lists for each in values)]
        given += [None] * (ctx.count - len(given))
        needs = ctx.needs_input_grad
        return tuple(each if n else None for each, n in zip(given, needs, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.net, ctx.count = inputs[0], len(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @classmethod
    def kinds(cls, net: Net, *tensors: Any) -> list[str]:
        """What each argument is, for vmap."""
        kinds_of = {
            "results": _batching.RESULTS,
            "primals": _batching.primals(net),
            "kept": _batching.kept(net),
        }
        known = [
            _batching.NONE,
            *_batching.BOUNDARIES,
            *(k for p in cls.parts for k in kinds_of[p]),
        ]
        return known + [_batching.ROWS] * (1 + len(tensors) - len(known))

    @classmethod
    def apply(cls, *arguments: Any) -> tuple[Tensor, ...]:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:
            return cls.forward(*arguments)
        # What torch does for defaults, of which there are none, takes a third of a short pass.
        return super(torch.autograd.Function, cls).apply(*arguments)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return _batching.map_over(cls, info.batch_size, in_dims, arguments)


class Network(_Derivative):
    """F: from the primals to output, h_n and c_n, and what is kept of each layer.

    The latter: the outputs of the layers below the top, c and gates of all.
    """

    parts = ("primals",)

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        (point,) = Network.read(*arguments)
        h_n, c_n, kept = forward_pass(point)
        top = point.net.num_layers - 1
        return kept[top], h_n, c_n, *kept[:top], *kept[top + 1 :]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        net = ctx.net = inputs[0]
        ctx.count = len(inputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[net.num_results :])
        saved = (*inputs[1:], *_kept_of(net, output))
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def point(ctx: Any) -> Point:
        """Where the forward pass was."""
        saved = ctx.saved_tensors
        (point,) = Network.read(ctx.net, *saved[: ctx.count - 1])
        return point._replace(kept=tuple(each.detach() for each in saved[ctx.count - 1 :]))

    @staticmethod
    @_batching.takes_older_vmap
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        needs, _ = Network.split(ctx.net, ctx.needs_input_grad)
        return Network.filled(ctx, _gradients(Network.point(ctx), grads[:3], needs))

    @staticmethod
    @_batching.takes_older_vmap
    def jvp(ctx: Any, *arguments_t: Any) -> tuple[Any, ...]:
        tangents, _ = Network.split(ctx.net, arguments_t)
        point = Network.point(ctx)
        results, _ = _second(point, NOTHING, NOTHING, tangents, ())
        return *results, *[None] * (len(point.kept) - 1)

    @staticmethod
    def result_kinds(net: Net, *_: Any) -> tuple[str, ...]:
        output, *kept = _batching.kept(net)
        return *_batching.RESULTS, *kept


def _kept_of(net: Net, results: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A point's ``kept``, of what Network gives."""
    output, _, _, *rest = results
    below = net.num_layers - 1
    return *rest[:below], output, *rest[below:]


class Gradients(_Derivative):
    """G: from the gradients of the results to those of the primals that are needed."""

    parts = ("results", "primals", "kept")
    has_groups = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        point, grads = Gradients.read(*arguments)
        net, L = point.net, point.net.num_layers
        if net.groups > 1:
            return _some(_apart(point, grads), net.needs)
        _, hx, cx, *weights = point.primals
        # The operator's own kernel for autograd leads to here.
        with torch._C._AutoDispatchBelowAutograd():
            gradients = network_bwd(
                *grads,
                hx,
                cx,
                *point.boundaries,
                weights,
                point.by_layer(),
                point.masks,
                net.has_biases,
                L,
                net.bidirectional,
                net.batch_first,
                net.cell,
                net.k1,
                net.k2,
                net.last_only,
                net.needs,
            )
        return _some(gradients, net.needs)

    @staticmethod
    @_batching.takes_older_vmap
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        point, grads = Gradients.read(ctx.net, *ctx.saved_tensors)
        _, needs, _, _ = Gradients.split(ctx.net, ctx.needs_input_grad)
        tangents = _for_each(cotangents, ctx.net.needs)
        of_results, of_primals = by_group(_second, point, grads, NOTHING, tangents, needs, True)
        return Gradients.filled(ctx, of_results, of_primals)

    @staticmethod
    @_batching.takes_older_vmap
    def jvp(ctx: Any, *arguments_t: Any) -> tuple[Any, ...]:
        point, grads = Gradients.read(ctx.net, *ctx.saved_tensors)
        grads_t, tangents, _, _ = Gradients.split(ctx.net, arguments_t)
        needs = ctx.net.needs
        if not _are_there(tangents):
            return _some(_gradients(point, grads_t, needs), needs)
        _, results = by_group(_second, point, grads, grads_t, tangents, needs, False)
        return _some(results, needs)

    @staticmethod
    def result_kinds(net: Net, *_: Any) -> tuple[str, ...]:
        return _some(_batching.primals(net), net.needs)


class Tangents(_Derivative):
    """J: from the tangents of the primals to those of the results. Windows lie side by side."""

    parts = ("primals", "primals", "kept")

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        point, tangents = Tangents.read(*arguments)
        results, _ = second_pass(point, NOTHING, NOTHING, tangents, [False] * len(tangents))
        return tuple(results)

    @staticmethod
    @_batching.takes_older_vmap
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        point, tangents = Tangents.read(ctx.net, *ctx.saved_tensors)
        needs, needs_tangents, *_ = Tangents.split(ctx.net, ctx.needs_input_grad)
        grads = (*grads, None)[:3]
        of_primals = [None] * len(needs)
        if any(needs):
            _, of_primals = _second(point, grads, NOTHING, tangents, needs)
        return Tangents.filled(ctx, of_primals, _gradients(point, grads, needs_tangents))

    @staticmethod
    @_batching.takes_older_vmap
    def jvp(ctx: Any, *arguments_t: Any) -> tuple[Any, ...]:
        point, tangents = Tangents.read(ctx.net, *ctx.saved_tensors)
        primals_t, tangents_t, *_ = Tangents.split(ctx.net, arguments_t)
        return _third.tangent_of_tangents(point, tangents, primals_t, tangents_t)

    @staticmethod
    def result_kinds(net: Net, *_: Any) -> tuple[str, ...]:
        return _batching.RESULTS[: net.num_results]


class Second(_Derivative):
    """J and D together: the tangents of the results, and of the gradients that are needed.

    Along those of the primals. Windows lie side by side.
    """

    parts = ("results", "results", "primals", "primals", "kept")

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        point, grads, grads_t, tangents = Second.read(*arguments)
        needs = point.net.needs
        results, of_primals = second_pass(point, grads, grads_t, tangents, needs)
        return *results, *_some(of_primals, needs)

    @staticmethod
    @_batching.takes_older_vmap
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        point, *parts = Second.read(ctx.net, *ctx.saved_tensors)
        return Second.filled(ctx, *_third.gradients_of_second(point, *parts, cotangents))

    @staticmethod
    @_batching.takes_older_vmap
    def jvp(ctx: Any, *arguments_t: Any) -> tuple[Any, ...]:
        point, *parts = Second.read(ctx.net, *ctx.saved_tensors)
        return _third.tangent_of_second(point, *parts, *Second.split(ctx.net, arguments_t)[:4])

    @staticmethod
    def result_kinds(net: Net, *_: Any) -> tuple[str, ...]:
        primals = _some(_batching.primals(net), net.needs)
        return *_batching.RESULTS[: net.num_results], *primals


def _gradients(point: Point, grads: OptionalTensors, needs: Sequence[bool]) -> list[Tensor | None]:
    """G, for each primal."""
    if not any(needs) or not _are_there(grads):
        return [None] * len(needs)
    net = point.net.but(needs=tuple(needs))
    results = Gradients.apply(
        net, *point.boundaries, *grads, *point.primals, *point.kept, *point.masks
    )
    return _for_each(results, needs)


def _second(
    point: Point,
    grads: OptionalTensors,
    grads_t: OptionalTensors,
    tangents: OptionalTensors,
    needs: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """J for each result and, where needed, D for each primal; of any truncation and dtype."""
    dtype = point.primals[0].dtype
    point = _exact(point)
    windows = windows_of(point)
    at = windows.point
    wide = at.primals[0].dtype
    grads, grads_t = (windows.grads(in_dtype(each, wide)) for each in (grads, grads_t))
    tangents = windows.tangents(in_dtype(tangents, wide))
    has_dual = any(needs) and (_are_there(grads) or _are_there(grads_t))
    net = at.net.but(needs=tuple(needs))
    context = (*at.kept, *at.masks)
    if has_dual:
        together = Second.apply(
            net, *at.boundaries, *grads, *grads_t, *at.primals, *tangents, *context
        )
        results, of_primals = together[: net.num_results], together[net.num_results :]
    elif _are_there(tangents):
        results = Tangents.apply(net, *at.boundaries, *at.primals, *tangents, *context)
        of_primals = ()
    else:
        results, of_primals = (), ()
    each = _for_each(of_primals, needs if has_dual else [False] * len(needs))
    each += [None] * (len(at.primals) - len(each))
    of_results = windows.results([*results, *[None] * (3 - len(results))])
    both = of_results, windows.sums(each)
    return tuple(in_dtype(tensors, dtype) for tensors in both)  # type: ignore


def _exact(point: Point) -> Point:
    """The same in a dtype that has tangents, and with the gates: where need be, run again."""
    input = point.primals[0]
    if input.dtype in (torch.float32, torch.float64) and point.has_all_gates():
        return point

    def wide(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dtype in (torch.float32, torch.float64):
            return tensor
        return tensor.float()

    primals = tuple(map(wide, point.primals))
    masks = tuple(map(wide, point.masks))
    kappa = wide(point.kappa)
    constants = (None if p is None else p.detach() for p in primals)
    results = Network.apply(point.net, point.batch_sizes, point.resets, kappa, *constants, *masks)
    kept = tuple(each.detach() for each in _kept_of(point.net, results))
    return point._replace(kappa=kappa, primals=primals, masks=masks, kept=kept)


def _apart(point: Point, grads: OptionalTensors) -> list[Tensor | None]:
    """The gradients of the primals, those of weights by group."""
    dtype, needs, groups = point.primals[0].dtype, point.net.needs, point.net.groups
    point = _exact(point)
    windows = windows_of(point)
    wide = point.primals[0].dtype
    grads = windows.grads(in_dtype(grads, wide))
    at = windows.point._replace(net=windows.point.net.but(needs=needs, groups=groups))
    results = apart_pass(at, grads, needs)
    results = windows.sums([t if n else None for t, n in zip(results, needs, strict=True)])
    return in_dtype(results, dtype)
