"""Networks by compiled steps, where they are not like plain loops: what is kept, and fallbacks."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import fastbptt
from common import assert_as_exact, one_thread, step
from fastbptt import Recurrent, _cell_network, _compiled, _compiler, _loops, cells


def net_of(cell=cells.leaky, *args, dtype=torch.float64, **extras):
    torch.manual_seed(0)
    return Recurrent(cell, 3, 4, *args, dtype=dtype, **(extras or {"alpha": 0.3}))


def data(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def by_loops(call):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cell_network, "unroll_of", lambda *_: _loops.unroll)
        return call()


@pytest.mark.parametrize("options", [{}, {"truncation": 2}], ids=["full", "chunked"])
def test_second_derivatives(options, compiled_steps):
    net = net_of(alpha=torch.nn.Parameter(torch.full((4,), 0.4)), noise="noise")
    resets = torch.tensor([0, 0, 1, 0]).bool()
    names = list(dict(net.named_parameters()))

    def call(x, noise, *parameters):
        given = dict(zip(names, parameters, strict=True))
        options_of_it = {"noise": noise, "resets": resets, **options}
        return torch.func.functional_call(net, given, (x,), options_of_it)[0]

    leaves = [data(4, 2, 3), data(4, 2, 1), *net.parameters()]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    if not options:  # a truncated gradient is no function's
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    by_hand = by_loops(lambda: penalty(call, leaves))
    for got, want in zip(penalty(call, leaves), by_hand, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def penalty(call, leaves):
    first = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


@pytest.mark.slow(6)
@pytest.mark.parametrize("name", ["leaky", "lstm", "zoneout_gru", "layer_norm_gru", "dreamer_gru"])
@pytest.mark.parametrize("truncation", [None, fastbptt.TBPTT(5, 8)], ids=str)
def test_float32_is_as_exact_as_the_plain_loop(name, truncation, compiled_steps):
    extras = {"alpha": 0.2} if name == "leaky" else {}
    extras |= {"zone_h": 0.3} if name == "zoneout_gru" else {}
    torch.manual_seed(0)
    net = Recurrent(getattr(cells, name), 12, 40, 2, truncation=truncation, **extras)
    x = data(23, 5, 12, dtype=torch.float32)
    ours = step(net, x)
    with one_thread():
        peer = by_loops(lambda: step(net, x))
        truth = by_loops(lambda: step(net.double(), x.double()))
    assert_as_exact(ours, peer, truth)


def test_results_are_freed_with_the_last_name(compiled_steps):
    net = net_of(cells.lstm, 2, dropout=0.0)
    output = net(data(4, 2, 3).requires_grad_())[0]
    found = weakref.ref(output)
    gc.disable()
    try:
        del output
        assert found() is None
    finally:
        gc.enable()


def test_a_change_in_place_is_noticed(compiled_steps):
    net, x = net_of(), data(4, 2, 3)
    output = net(x)[0]
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_backward_twice(compiled_steps):
    net = net_of()
    loss = net(data(4, 2, 3))[0].square().sum()
    first = torch.autograd.grad(loss, net.weight_hh_l0, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, net.weight_hh_l0)[0], first)


def test_without_gradients(compiled_steps):
    net, x = net_of(), data(4, 2, 3)
    expected = net(x)[0]
    with torch.no_grad():
        assert torch.equal(net(x)[0], expected)
    with torch.inference_mode():
        assert torch.equal(net(x)[0], expected)


def test_frozen_weights(compiled_steps):
    net, x = net_of().requires_grad_(False), data(4, 2, 3).requires_grad_()
    got = torch.autograd.grad(net(x)[0].sum(), x)[0]
    assert torch.equal(got, torch.autograd.grad(net_of()(x)[0].sum(), x)[0])


def test_where_there_are_none_the_loop_runs():
    """Half precision, autocast, transforms, forward mode."""
    net, x = net_of(), data(4, 2, 3)
    expected = net(x)[0]
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(net(forward_ad.make_dual(x, x))[0]).tangent
    assert tangent.abs().max() > 0
    torch.testing.assert_close(torch.vmap(lambda x: net(x)[0])(x[None])[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net.float()(x.float())[0].double(), expected, rtol=0.1, atol=0.1)
    output = net.bfloat16()(x.bfloat16())[0]
    torch.testing.assert_close(output.double(), expected, rtol=0.1, atol=0.1)


def test_without_a_compiler_the_loop_runs_with_a_warning(monkeypatch):
    def fails(*_):
        raise _compiler.Unavailable("the compiler's message, for a test")

    fresh = fastbptt.cell(gates=1, states=1)(cells.leaky.function)
    net, x = net_of(fresh), data(4, 2, 3)
    expected = by_loops(lambda: net(x)[0])
    monkeypatch.setattr(_compiled, "_layers", {})
    monkeypatch.setattr(_compiled, "_said", set())
    monkeypatch.setattr(_compiler, "library", fails)
    with pytest.warns(RuntimeWarning, match="the compiler's message, for a test"):
        assert torch.equal(net(x)[0], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(net(x)[0], expected)


def test_a_number_is_each_calls_own():
    """Whatever was at work when it was first met: it is made once for all calls of its dtype."""
    number = 0.6180339
    x = data(4, 2, 3)
    with torch.inference_mode():
        expected = net_of(alpha=number)(x)[0]
    with FakeTensorMode() as mode, torch.no_grad():
        net_of(alpha=number / 2)(mode.from_tensor(x))
    for alpha in (number, number / 2):
        net = net_of(alpha=alpha)
        net(x)[0].sum().backward()  # which keeps it
        assert net.weight_hh_l0.grad.abs().max() > 0
    assert torch.equal(net_of(alpha=number)(x)[0], expected)
    assert net_of(alpha=number, dtype=torch.float32)(x.float())[0].dtype == torch.float32


def test_a_zeros_sign_is_kept(compiled_steps):
    """0.0 and -0.0 are equal, and not the same number."""
    cell = fastbptt.cell(gates=1, states=1)(lambda pre, rec, state, sign: (pre[0] * sign,))
    plus, minus = (net_of(cell, sign=sign)(data(1, 1, 3))[0].signbit() for sign in (0.0, -0.0))
    assert torch.equal(plus, ~minus)
