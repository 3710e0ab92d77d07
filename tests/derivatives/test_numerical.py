"""Every derivative against finite differences, where nothing is truncated."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence

import fastbptt
from calls import Call
from common import Case, assert_matches, parts, tensors_of, whole
from orders import leaves_of

CELLS = ["tanh", "relu", "identity", "gru", "lstm", "projected"]


def function_and_leaves(call: Call):
    """The results as a function of the input, the states and all parameters."""
    module = call.module()
    leaves, input = leaves_of(call, module)
    packed = input[1:] if isinstance(input, PackedSequence) else None
    states = [name for name in ("hx", "cx") if name in leaves]
    names = [name for name, _ in module.named_parameters()]
    resets = call.make_resets()

    def function(x, *rest):
        if packed is not None:
            x = PackedSequence(x, *packed)
        weights = dict(zip(names, rest[len(states) :], strict=True))
        arguments = (x, whole(rest[: len(states)]))
        options = {"resets": resets}
        return tensors_of(torch.func.functional_call(module, weights, arguments, options))

    return function, [leaves["x"], *(leaves[name] for name in states), *module.parameters()]


def call_of(cell: str, layers: int, **options) -> Call:
    resets = options.pop("resets", "none")
    proj = 2 if cell == "projected" else 0
    cell = "lstm" if proj else cell
    # Few steps: the rectifier's kink is then far from all of its arguments.
    return Call(Case(3, 2, 2, 3, layers, cell=cell, proj=proj, **options), resets=resets)


KINDS = {
    "plain": {},
    "both directions": {"bidirectional": True, "batch_first": True},
    "packed": {"lengths": (2, 3)},
    "packed, both directions": {"lengths": (2, 3), "bidirectional": True, "bias": False},
    "resets": {"resets": "some", "batch_first": True},
}


@pytest.mark.slow(10)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(cell, layers, kind):
    function, leaves = function_and_leaves(call_of(cell, layers, **KINDS[kind]))
    fast = {"fast_mode": True}
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True, **fast)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, check_batched_grad=True, **fast)


@pytest.mark.parametrize("cell", CELLS)
def test_all_of_the_jacobian(cell):
    function, leaves = function_and_leaves(call_of(cell, 1))
    options = {"check_batched_grad": True, "check_undefined_grad": True}
    assert gradcheck(function, leaves, check_forward_ad=True, **options)
    assert gradgradcheck(function, leaves, **options)


@pytest.mark.parametrize("cls", [fastbptt.RNN, fastbptt.GRU, fastbptt.LSTM])
def test_hessian(cls):
    """Of three steps, in all weights, by torch.func and by torch.autograd."""
    torch.manual_seed(0)
    net, x = cls(1, 2, dtype=torch.float64), torch.randn(3, 2, 1, dtype=torch.float64)
    sizes = {name: p.shape for name, p in net.named_parameters()}

    def loss(flat):
        of_each = flat.split([size.numel() for size in sizes.values()])
        weights = {n: w.view(s) for (n, s), w in zip(sizes.items(), of_each, strict=True)}
        output, last = torch.func.functional_call(net, weights, (x,))
        return output.sin().sum() + sum(state.square().sum() for state in parts(last))

    at = torch.cat([p.detach().flatten() for p in net.parameters()])
    step = 1e-5
    gradient = torch.func.grad(loss)
    differences = [
        gradient(at + step * e) - gradient(at - step * e)
        for e in torch.eye(len(at), dtype=at.dtype)
    ]
    expected = {"": torch.stack(differences) / (2 * step)}
    by_autograd = torch.autograd.functional.hessian
    for found in (
        torch.func.hessian(loss)(at),
        torch.func.jacrev(torch.func.jacrev(loss))(at),
        torch.func.jacrev(torch.func.jacfwd(loss))(at),
        by_autograd(loss, at),
        by_autograd(loss, at, vectorize=True),
        by_autograd(loss, at, vectorize=True, outer_jacobian_strategy="forward-mode"),
    ):
        assert_matches({"": found}, expected, rtol=1e-8)
