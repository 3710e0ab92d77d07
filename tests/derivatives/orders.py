"""First and second derivatives of a call, each under its name, for our modules and their peers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastbptt
from calls import Call
from common import Results, cotangent, leaf, parts, referee, tensors_of, twin, whole


def leaves_of(call: Call, module) -> tuple[dict[str, Tensor], object]:
    """Fresh leaves by name (input, states, parameters), and the input to call with."""
    x, hx = call.case.data()
    x, input = leaf(x)
    states = [leaf(state)[0] for state in parts(hx)]
    named = {"x": x, **dict(zip(("hx", "cx"), states, strict=False))}
    return named | dict(module.named_parameters()), input


def second(call: Call, module, function: Callable, rounded=None) -> Results:
    """The gradient of <u, G> in all that the gradients G depend on, u given and the same for all.

    ``rounded``: the dtype whose numbers u and the results' gradients are, if not the call's.
    """
    leaves, input = leaves_of(call, module)
    states = whole([leaves[name] for name in ("hx", "cx") if name in leaves])
    outputs = dict(zip(("output", "h_n", "c_n"), tensors_of(function(input, states)), strict=False))
    outputs = {name: tensor for name, tensor in outputs.items() if name in call.through}
    grads = {
        "g " + name: cotangent(tensor, i, rounded).detach().requires_grad_()
        for i, (name, tensor) in enumerate(outputs.items())
    }
    first = torch.autograd.grad(
        list(outputs.values()),
        list(leaves.values()),
        list(grads.values()),
        create_graph=True,
        allow_unused=True,
    )
    product = sum(
        (d * cotangent(d, 10 + i, rounded)).sum() for i, d in enumerate(first) if d is not None
    )
    wanted = leaves | grads
    results = torch.autograd.grad(
        product, list(wanted.values()), allow_unused=True, materialize_grads=True
    )
    return {name: d.detach() for name, d in zip(wanted, results, strict=True)}


def ours(call: Call) -> Results:
    module = call.module()
    return second(call, module, function_of(call, module))


def function_of(call: Call, module) -> Callable:
    """The module's call, with all that goes with it."""

    def function(input, hx=None):
        call.seed_dropout()
        options = {"truncation": call.make_truncation(), "resets": call.make_resets()}
        return module(input, hx, **options)

    return function


def expected(call: Call) -> Results:
    """torch.nn's where it has such a network, else the reference's."""
    module = call.module()
    if call.truncation is None and call.resets == "none" and call.case.cell != "identity":
        peer = twin(module)

        def by_torch(input, hx=None):
            call.seed_dropout()
            return peer(input, hx)

        return second(call, peer, by_torch)
    double = referee(module)[0]

    def by_loops(input, hx=None):
        call.seed_dropout()
        return fastbptt.reference.run(
            double,
            input,
            hx,
            truncation=call.make_truncation(),
            resets=call.make_resets(),
            dropout_masks=call.make_masks(),
        )

    return second(call, double, by_loops)
