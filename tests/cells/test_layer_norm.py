"""fastbptt.layer_norm in a cell's function: what it computes, how it is recorded, its errors."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

import fastbptt
from fastbptt import Recurrent, cells, layer_norm
from fastbptt._program import Op, Ref
from fastbptt._trace import trace

H = 6


def data(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_one_value_is_torchs():
    x, weight, bias = data(3, H), data(H, seed=2), data(H, seed=3)
    torch.testing.assert_close(layer_norm(x), F.layer_norm(x, (H,)))
    torch.testing.assert_close(layer_norm(x, weight, bias), F.layer_norm(x, (H,), weight, bias))
    got = layer_norm(x, weight, eps=0.5)
    torch.testing.assert_close(got, F.layer_norm(x, (H,), weight, eps=0.5))
    torch.testing.assert_close(layer_norm(x, 2.0, 1.0), 2 * F.layer_norm(x, (H,)) + 1)


def test_several_values_are_normalized_together():
    x = data(3, 4, 3 * H)
    weight, bias = data(3 * H, seed=2), data(3 * H, seed=3)
    got = layer_norm(x.chunk(3, -1), weight.chunk(3), bias.chunk(3), eps=0.1)
    assert isinstance(got, tuple) and len(got) == 3
    expected = F.layer_norm(x, (3 * H,), weight, bias, eps=0.1)
    torch.testing.assert_close(torch.cat(got, -1), expected)
    got = torch.cat(layer_norm(list(x.chunk(3, -1)), weight[:H], 0.5), -1)
    torch.testing.assert_close(got, F.layer_norm(x, (3 * H,)) * weight[:H].repeat(3) + 0.5)


def test_values_that_all_units_share():
    """A number, or one for each sequence, counts as often as there are units."""
    x, y = data(3, H), data(3, 1, seed=2)
    number = torch.tensor(0.5, dtype=torch.float64)
    expected = layer_norm((x, y.expand(3, H), number.expand(3, H)))
    for third in (0.5, number):
        for a, b in zip(layer_norm((x, y, third)), expected, strict=True):
            torch.testing.assert_close(a, b)
    assert not layer_norm(y).any() and not layer_norm(number).any()


def function(pre, rec, state, gain, shift):
    a, b = layer_norm(rec, gain, eps=1e-3)
    (c,) = state
    c = c * torch.sigmoid(a + pre[0]) + b
    return (torch.tanh(layer_norm(c, bias=shift)) + layer_norm(pre[1]),)


def test_program():
    program = trace(function, 2, 1, ("gain", "shift"), ("gain",))
    keys = [leaf.key for leaf in program.leaves if leaf.kind == "extra"]
    assert keys == ["gain[0]", "gain[1]", "shift"] == list(program.extras)
    normalized = [op for op in program.ops if op.name == "normalized"]
    assert normalized[:2] == [Op("normalized", (float(k), Ref(2), Ref(3), 1e-3)) for k in range(2)]
    phases = program.phases
    first = len(program.leaves)
    assert len(phases) == first + len(program.ops) and not any(phases[:first])
    by_values = {
        op.args[1:]: phases[first + i] for i, op in enumerate(program.ops) if op in normalized
    }
    assert [by_values[Ref(2), Ref(3), 1e-3], by_values[Ref(1), 1e-5]] == [1, 1]
    assert sorted(by_values.values()) == [1, 1, 2] and max(phases) == 2
    assert max(trace(cells.gru.function, 3, 1, ()).phases) == 0


def test_program_is_the_function():
    program = trace(function, 2, 1, ("gain", "shift"), ("gain",))
    values = {
        leaf: data(*((3, H) if leaf.kind != "extra" else (H,)), seed=i).requires_grad_()
        for i, leaf in enumerate(program.leaves)
    }
    pre, rec, (h,), (*gain, shift) = (
        [v for leaf, v in values.items() if leaf.kind == kind]
        for kind in ("pre", "rec", "state", "extra")
    )
    (expected,) = function(pre, rec, (h,), tuple(gain), shift)
    (got,) = program.evaluate(values)
    torch.testing.assert_close(got, expected)
    loss = torch.cos(torch.arange(3.0 * H, dtype=torch.float64)).view(3, H)
    for a, b in zip(
        torch.autograd.grad(got, values.values(), loss),
        torch.autograd.grad(expected, values.values(), loss),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_what_is_normalized_twice_stands_once():
    def twice(pre, rec, state):
        return layer_norm(pre)[0] + layer_norm(pre)[0], layer_norm(torch.zeros_like(pre[0])) + 1

    program = trace(twice, 2, 2, ())
    assert [op.name for op in program.ops] == ["normalized", "add"]
    assert program.results[1] == 1.0


X = ("value", "value")
ERRORS = {  # name: (the arguments, where "value" is one of the cell's, the error, what it says)
    "no value": ((1.0,), TypeError, "values must be a cell's value or a tuple of them, got 1.0"),
    "numbers": (((1.0, 2),), TypeError, r"values must be a cell's .* got \(1.0, 2\)"),
    "none": (((),), ValueError, "values must be a value or a tuple of at least one"),
    "text": ((("value", "gain"),), TypeError, "values must be made of .* got 'gain' of type str"),
    "bool": ((("value", True),), TypeError, "values must be made of .* got True of type bool"),
    "weights": ((X, X[:1]), ValueError, "weight must be one value or a tuple of 2 .* got 1"),
    "biases": ((X, None, (*X, 1)), ValueError, "bias must be one value or a tuple of 2 .* got 3"),
    "a tuple": (("value", X), TypeError, "weight must be one value as values is, got 2 of them"),
    "no number": ((X, X, [None, 0]), TypeError, "bias must be made of .* got None of type NoneT"),
    "eps": ((X, X, X, 0), ValueError, "eps must be positive and finite, got 0"),
    "infinite": ((X, X, X, float("inf")), ValueError, "eps must be positive and finite, got inf"),
    "nan": ((X, X, X, float("nan")), ValueError, "eps must be positive and finite, got nan"),
    "eps' type": ((X, X, X, "1e-5"), TypeError, "eps must be a number, got '1e-5' of type str"),
    "a bool": ((X, X, X, True), TypeError, "eps must be a number, got True of type bool"),
    "a tensor": (((*X, torch.ones(3)),), TypeError, r"layer_norm with a tensor of shape \(3,\)"),
    "weight": (("value", torch.ones(3)), TypeError, r"mul with a tensor of shape \(3,\)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_at_definition_names_the_line(name):
    given, error, message = ERRORS[name]

    def of(value, x):
        if isinstance(value, tuple | list):
            return type(value)(of(each, x) for each in value)
        return x if isinstance(value, str) and value == "value" else value

    def wrong(pre, rec, state):
        normed = layer_norm(*(of(value, rec[0]) for value in given))
        return (normed[0],)

    with pytest.raises(error, match=message) as caught:
        fastbptt.cell(gates=1, states=1)(wrong)
    line = int(re.search(re.escape(__file__) + r":(\d+)", str(caught.value)).group(1))
    assert line == wrong.__code__.co_firstlineno + 1


def test_an_error_of_tensors():
    with pytest.raises(ValueError, match="weight must be one value or a tuple of 2"):
        layer_norm((data(3, H), data(3, H)), (1.0,))


def test_torchs_own_names_ours():
    with pytest.raises(TypeError, match="layer_norm, which for a cell is fastbptt.layer_norm, at"):
        trace(lambda pre, rec, state: (F.layer_norm(pre[0], (H,)),), 1, 1, ())


@fastbptt.cell(gates=2, states=1, per_gate=["gain", "shift"])
def scaled(pre, rec, state, gain, alpha=1.0, shift=0.5):
    return (torch.tanh(gain[0] * pre[0] + shift[0]) + gain[1] * rec[1] * alpha + shift[1],)


def test_an_argument_with_a_value_for_each_gate():
    assert scaled.per_gate == ("gain", "shift") and scaled.extras == ("gain", "alpha", "shift")
    torch.manual_seed(0)
    gain = torch.nn.Parameter(torch.rand(2, H))
    net = Recurrent(scaled, 3, H, 2, dtype=torch.float64, gain=gain)
    own = [net.gain_l0, net.gain_l1]
    assert all(torch.equal(p, gain.double()) and p is not gain for p in own)
    assert own[0] is not own[1] and not hasattr(net, "shift_l0")
    x = data(4, 2, 3)
    output, _ = net(x)
    output.sum().backward()
    assert all(parameter.grad.shape == (2, H) and parameter.grad.all() for parameter in own)
    assert "gain=<2 x 6 parameters>, alpha=1.0, shift=0.5" in repr(net)
    h = torch.zeros(2, H, dtype=torch.float64)
    for t in range(4):
        pre = F.linear(x[t], net.weight_ih_l0, net.bias_ih_l0)[:, :H]
        rec = F.linear(h, net.weight_hh_l0, net.bias_hh_l0)[:, H:]
        h = torch.tanh(gain.double()[0] * pre + 0.5) + gain.double()[1] * rec + 0.5
    torch.testing.assert_close(Recurrent.forward(net, x)[1][0], h)
    number, tensor = (
        Recurrent(scaled, 3, H, dtype=torch.float64, gain=value)
        for value in (0.75, torch.full((2, H), 0.75))
    )
    tensor.load_state_dict({**number.state_dict(), "gain_l0": tensor.gain_l0})
    assert torch.equal(number(x)[0], tensor(x)[0]) and not tensor.gain_l0.requires_grad


@pytest.mark.parametrize(
    "gain, error, message",
    [
        (torch.ones(H), ValueError, r"gain must .* shape \(2, 6\), a value for each gate and unit"),
        (torch.ones(2, H).int(), ValueError, "gain must be floating point"),
        (
            "gain",
            TypeError,
            r"gain, .* each gate, must be a number or a Tensor \[2, 6\], got 'gain'",
        ),
        (cells.Normal(1.0), TypeError, "gain, which .* got Normal.* of type Normal"),
    ],
)
def test_what_such_an_argument_cannot_be(gain, error, message):
    with pytest.raises(error, match=message):
        Recurrent(scaled, 3, H, gain=gain)


@pytest.mark.parametrize("per_gate", ["gain", ("gain", "pre"), ("a",), 1, (1,)])
def test_per_gate_names_arguments(per_gate):
    with pytest.raises(TypeError, match=r"per_gate must be a tuple of names .* \(gain\), got "):
        fastbptt.cell(gates=1, states=1, per_gate=per_gate)(lambda pre, rec, state, gain: (pre[0],))


def net_of(cell, *args, dtype=torch.float64, **extras):
    torch.manual_seed(0)
    return Recurrent(cell, 3, H, *args, dtype=dtype, bias=False, **extras)


NORMALIZED = ["dreamer_gru", "layer_norm_gru", "layer_norm_lstm"]


@pytest.mark.parametrize("name", NORMALIZED)
def test_second_derivatives(name):
    cell = getattr(cells, name)
    gains = {e: torch.nn.Parameter(data(cell.gates, H).abs()) for e in cell.per_gate}
    net = net_of(cell, 2, **gains)
    names = [name for name, _ in net.named_parameters()]

    def call(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        output, last = torch.func.functional_call(net, given, (x,))
        return output, *(last if isinstance(last, tuple) else (last,))

    leaves = [data(3, 2, 3).requires_grad_(), *net.parameters()]
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("name", NORMALIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(name, dtype):
    cell = getattr(cells, name)
    x, expected = data(4, 2, 3), net_of(cell)(data(4, 2, 3))[0]
    output = net_of(cell).to(dtype)(x.to(dtype))[0]
    assert output.dtype == dtype
    rtol = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(output.double(), expected, rtol=rtol, atol=rtol / 2)


@pytest.mark.parametrize("name", NORMALIZED)
def test_autocast(name):
    net, x = net_of(getattr(cells, name), dtype=torch.float32), data(6, 2, 3).float()
    exact = net(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = net(x)[0]
    assert output.dtype == torch.float32 and not torch.equal(output, exact)
    torch.testing.assert_close(output, exact, rtol=0.1, atol=0.05)
    output.sum().backward()
    assert net.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("name", NORMALIZED)
def test_without_gradients(name):
    net, x = net_of(getattr(cells, name), 2), data(6, 2, 3)
    expected = net(x)[0]
    with torch.no_grad():
        assert torch.equal(net(x)[0], expected)


@pytest.mark.parametrize("name", NORMALIZED)
def test_transforms(name):
    net, x = net_of(getattr(cells, name)), data(4, 3, 2, 3)
    weights = dict(net.named_parameters())

    def loss(weights, x):
        return torch.func.functional_call(net, weights, (x,))[0].square().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for i in range(4):
        own = torch.autograd.grad(loss(weights, x[i]), list(weights.values()))
        for name, gradient in zip(weights, own, strict=True):
            torch.testing.assert_close(got[name][i], gradient)


def test_a_batch_of_one_and_one_unit():
    """Of one unit alone the normalized value is 0."""
    net = Recurrent(cells.dreamer_gru, 3, 1, gain=2.0, shift=0.5, dtype=torch.float64)
    assert net(data(4, 3))[0].isfinite().all()

    @fastbptt.cell(gates=1, states=1)
    def one(pre, rec, state):
        return (layer_norm(pre[0] + rec[0], bias=state[0] + 1),)

    output, _ = Recurrent(one, 3, 1, dtype=torch.float64)(data(4, 3))
    torch.testing.assert_close(output[:, 0], torch.arange(1.0, 5.0, dtype=torch.float64))
