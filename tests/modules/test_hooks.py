"""The autograd nodes of a call's results: hooks, names, and gradients through them."""

from __future__ import annotations

import pytest
import torch

import fastbptt
from common import Case, tensors_of, twin

CELLS = ("tanh", "gru", "lstm")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("used", [(0,), (1,), (-1,), (0, 1)], ids=str)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_hook_is_called_where_its_result_is_used(cell, used, layers):
    """As in torch.nn: not at all on a state that no loss comes to."""
    case = Case(cell=cell, layers=layers)
    module = case.module()
    called = []
    for network in (module, twin(module)):
        results, calls = tensors_of(network(*case.data())), {}
        for i, result in enumerate(results):
            if i > 0 or 0 in used:
                result.register_hook(lambda grad, i=i, calls=calls: calls.update({i: grad.clone()}))
        sum(results[i].square().sum() for i in used).backward()
        called.append(calls)
    ours, theirs = called
    wanted = {i % len(results) for i in used}
    assert wanted <= set(ours) <= set(theirs) | wanted
    assert len(results) - 1 in wanted or len(results) - 1 not in ours
    for i in wanted - {0}:
        torch.testing.assert_close(ours[i], theirs[i])


def test_hooks_on_every_segment_s_state():
    module = fastbptt.LSTM(3, 4)
    states, loss = None, 0
    for _ in range(3):
        output, states = module(torch.randn(5, 2, 3), states)
        loss = loss + output.sum()
        for state in states:
            state.register_hook(lambda grad: grad.clamp(-1, 1))
    loss.backward()
    assert all(p.grad is not None for p in module.parameters())


def test_a_hook_changes_the_gradient():
    module, x = fastbptt.GRU(3, 4), torch.randn(5, 2, 3)
    output, h_n = module(x)
    expected = torch.autograd.grad(2 * h_n.sum() + output.sum(), module.weight_hh_l0)
    output, h_n = module(x)
    h_n.register_hook(lambda grad: 2 * grad)
    h_n.retain_grad()
    (h_n.sum() + output.sum()).backward()
    assert h_n.grad.eq(2).all() and torch.equal(module.weight_hh_l0.grad, expected[0])


@pytest.mark.parametrize("cell", CELLS)
def test_names(cell):
    case = Case(cell=cell)
    output, *states = tensors_of(case.module()(*case.data()))
    assert "<fastbptt::NetworkBackward>" in output.grad_fn.name()
    assert {state.grad_fn.name() for state in states} == {"FastbpttStateBackward"}


def test_compiled_autograd():
    module, x = fastbptt.LSTM(3, 4), torch.randn(5, 2, 3)
    expected = torch.autograd.grad(module(x)[0].sum(), module.weight_hh_l0)[0]
    with torch._dynamo.compiled_autograd._enable(
        lambda graph: torch.compile(graph, backend="eager", fullgraph=False)
    ):
        module(x)[0].sum().backward()
    assert torch.equal(module.weight_hh_l0.grad, expected)
