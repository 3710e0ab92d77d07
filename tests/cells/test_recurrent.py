"""fastbptt.Recurrent as a module: cells' arguments, layouts, states, dropout, autocast, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastbptt
from common import through_file, through_pickle
from fastbptt import Chunked, Recurrent, cells

H = 4


@pytest.fixture(params=["plain", "default"], autouse=True)
def steps(request):
    """By plain loops, and as networks run without being told."""
    if request.param == "plain":
        request.getfixturevalue("plain")


@fastbptt.cell(gates=2, states=2, recurrent=1, output=0)
def two(pre, rec, state, a, b=0.5):
    """With two gates, two states, and all kinds of arguments."""
    x, y = state
    x = torch.tanh(pre[0] + rec[0]) + a * x
    return x, torch.sigmoid(pre[1] + rec[1]) * b + y / 2


def net_of(cell=two, *args, **options):
    torch.manual_seed(0)
    return Recurrent(cell, 3, H, *args, dtype=torch.float64, **options)


def data(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_what_a_cell_shows():
    assert (two.gates, two.states, two.recurrent, two.output) == (2, 2, 1, 0)
    assert two.extras == ("a", "b") and two.defaults == {"b": 0.5}
    assert two.__name__ == "two" and two.__doc__ == two.function.__doc__
    assert repr(two) == "<fastbptt.cell two, gates=2, states=2>"
    values = [data(2, H, seed=i) for i in range(6)]
    got = two(values[:2], values[2:4], values[4:], 0.3)
    torch.testing.assert_close(got[0], torch.tanh(values[0] + values[2]) + 0.3 * values[4])
    assert through_pickle(two) is copy.deepcopy(two) is two


def test_parameters_are_named_and_drawn_as_torchs():
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    torch.manual_seed(0)
    peer = torch.nn.GRU(3, H, **options)
    torch.manual_seed(0)
    net = Recurrent(cells.gru, 3, H, **options)
    assert net.state_dict().keys() == peer.state_dict().keys()
    for name, value in peer.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
    assert len(net.all_weights) == 4 and net.all_weights[1][1] is net.weight_hh_l0_reverse
    net.flatten_parameters()


def test_parameters_per_unit():
    a, b = torch.nn.Parameter(torch.rand(H)), torch.rand(H)
    net = net_of(two, 2, bidirectional=True, a=a, b=b)
    own = [getattr(net, f"a_l{end}") for end in ("0", "0_reverse", "1", "1_reverse")]
    assert len({id(parameter) for parameter in own}) == 4
    assert all(torch.equal(parameter, a.double()) for parameter in own)
    assert all(p.requires_grad and p.dtype == torch.float64 for p in own)
    assert not net.b_l0.requires_grad and torch.equal(net.b_l1, b.double())
    net(data(5, 2, 3))[0].sum().backward()
    assert all(parameter.grad.abs().min() > 0 for parameter in own)
    assert a.grad is None and net.b_l0.grad is None


def test_a_number_is_the_same_as_a_parameter_or_an_input():
    x, number = data(5, 2, 3), net_of(a=0.3)
    expected = number(x)[0]
    for value, call in [
        (torch.full((H,), 0.3, dtype=torch.float64), {}),
        ("a", {"a": 0.3}),
        ("mask", {"mask": torch.full((5, 2, H), 0.3)}),
        ("mask", {"mask": torch.full((5, 2, 1), 0.3)}),
        ("mask", {"mask": torch.full((1, 5, 2, 1), 0.3)}),
    ]:
        net = net_of(a=value)
        net.load_state_dict(number.state_dict(), strict=False)
        output = net(x, **call)[0]
        torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-7)
        assert output.dtype == torch.float64
    assert torch.equal(net_of(a=0.3, b=0.5)(x)[0], expected)
    assert not torch.allclose(net_of(a=0.4)(x)[0], expected)


@pytest.mark.parametrize("wide", [1, H])
def test_layouts_of_inputs_per_step(wide):
    """Unbatched, batch_first and packed calls give what the padded one gives."""
    net = net_of(two, 2, a="a")
    x, hx = data(6, 3, 3), (data(2, 3, H), data(2, 3, H, seed=2))
    for a in (data(6, 3, wide, seed=3), data(2, 6, 3, wide, seed=3)):
        output, last, every = net(x, hx, a=a, return_states=True)
        assert output.shape == (6, 3, H) and [s.shape for s in last] == [(2, 3, H)] * 2
        assert [s.shape for s in every] == [(2, 6, 3, H)] * 2
        torch.testing.assert_close(every[0][1], output)
        torch.testing.assert_close(every[1][:, -1], last[1])

        alone = net(x[:, 1], tuple(s[:, 1] for s in hx), a=a[..., 1, :], return_states=True)
        assert_close(alone, (output[:, 1], [s[:, 1] for s in last], [s[:, :, 1] for s in every]))

        turned = copy.deepcopy(net)
        turned.batch_first = True
        got = turned(x.transpose(0, 1), hx, a=a.transpose(-3, -2), return_states=True)
        swapped = [s.transpose(1, 2) for s in every]
        assert_close(got, (output.transpose(0, 1), last, swapped))

        lengths = [4, 6, 1]
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        calls = [a]
        if a.dim() == 3:
            calls.append(pack_padded_sequence(a, lengths, enforce_sorted=False))
        for given in calls:
            got, ends, rows = net(packed, hx, a=given, return_states=True)
            expected = pack_padded_sequence(output, lengths, enforce_sorted=False)
            torch.testing.assert_close(got.data, expected.data)
            for b, n in enumerate(lengths):
                torch.testing.assert_close(ends[1][:, b], every[1][:, n - 1, b])
            torch.testing.assert_close(rows[0][1], got.data)


def assert_close(got, expected):
    assert got[0].shape == expected[0].shape
    torch.testing.assert_close(got[0], expected[0])
    for a, b in zip([*got[1], *got[2]], [*expected[1], *expected[2]], strict=True):
        torch.testing.assert_close(a, b)


def test_one_state_is_no_tuple():
    net = net_of(cells.elman)
    output, last, every = net(data(5, 2, 3), data(1, 2, H), return_states=True)
    assert last.shape == (1, 2, H) and torch.equal(every[0], output)


def test_states_have_gradients():
    """A loss in a state that is neither the output nor a last one, against a loop by hand."""
    net = net_of(two, a=0.3)
    x = data(5, 2, 3)
    for truncation in (None, 2):
        _, _, (_, y) = net(x, return_states=True, truncation=truncation)
        got = torch.autograd.grad(y.square().sum(), net.weight_hh_l0)[0]
        states, loss = (torch.zeros(2, H, dtype=torch.float64),) * 2, 0
        for t in range(5):
            if truncation and t % truncation == 0:
                states = tuple(state.detach() for state in states)
            pre = (x[t] @ net.weight_ih_l0.T + net.bias_ih_l0).chunk(2, -1)
            rec = (states[1] @ net.weight_hh_l0.T + net.bias_hh_l0).chunk(2, -1)
            states = two.function(pre, rec, states, 0.3)
            loss = loss + states[1].square().sum()
        torch.testing.assert_close(got, torch.autograd.grad(loss, net.weight_hh_l0)[0])


def test_truncation_of_the_module_and_of_the_call():
    x = data(6, 2, 3)

    def gradient(net, **options):
        return torch.autograd.grad(net(x, **options)[0].sum(), net.weight_hh_l0)[0]

    full, cut = net_of(a=0.3), net_of(a=0.3, truncation=2)
    assert cut.truncation == Chunked(2)
    torch.testing.assert_close(gradient(cut), gradient(full, truncation=2), rtol=0, atol=0)
    torch.testing.assert_close(gradient(cut, truncation=None), gradient(full), rtol=0, atol=0)
    assert not torch.allclose(gradient(cut), gradient(full))


def test_dropout_is_between_layers_in_training_alone():
    x = data(4, 3, 3)
    net = net_of(cells.elman, 2, dropout=0.5)
    reference = net_of(cells.elman, 2)
    assert torch.equal(net.eval()(x)[0], reference(x)[0])
    net.train()
    torch.manual_seed(5)
    output, last, every = net(x, return_states=True)
    torch.manual_seed(5)
    mask = torch.nn.functional.dropout(torch.ones(4, 3, H, dtype=torch.float64), 0.5)
    first = torch.nn.RNN(3, H, dtype=torch.float64)
    second = torch.nn.RNN(H, H, dtype=torch.float64)
    state = net.state_dict()
    first.load_state_dict({name: v for name, v in state.items() if "_l0" in name})
    second.load_state_dict({n.replace("l1", "l0"): v for n, v in state.items() if "_l1" in n})
    torch.testing.assert_close(output, second(first(x)[0] * mask)[0])
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    net_of(cells.elman, 2, dropout=1.0)(x)


def test_draws_in_training_and_means_in_evaluation():
    zones = {"zone_h": cells.Bernoulli(0.25), "zone_c": cells.Bernoulli(0.5)}
    net = net_of(cells.zoneout_lstm, 2, **zones)
    x = data(4, 3, 3)
    torch.manual_seed(7)
    drawn = net(x)[0]
    torch.manual_seed(7)
    masks = {name: zones[name].draw((2, 4, 3, H), x) for name in zones}
    torch.testing.assert_close(net(x, **masks)[0], drawn, rtol=0, atol=0)
    assert not torch.equal(net(x)[0], drawn)
    expected = net_of(cells.zoneout_lstm, 2, zone_h=0.25, zone_c=0.5)(x)[0]
    assert torch.equal(net.eval()(x)[0], expected)


def test_bernoulli_and_normal():
    like = torch.empty(0, dtype=torch.float64)
    torch.manual_seed(0)
    mask = cells.Bernoulli(0.75, 1 / 0.75, per_sequence=True).draw((2, 50, 40, 30), like)
    assert mask.shape == (2, 50, 40, 30) and mask.dtype == torch.float64
    assert torch.equal(mask[:, 0], mask[:, 49])
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.75}
    assert abs(mask.mean().item() - 1) < 0.05 and cells.Bernoulli(0.75, 1 / 0.75).mean == 1
    mask = cells.Bernoulli(0.25).draw((1, 50, 40, 30), like)
    assert abs(mask.mean().item() - 0.25) < 0.01 and not torch.equal(mask[:, 0], mask[:, 1])
    noise = cells.Normal(0.5).draw((1, 50, 40, 30), like)
    assert abs(noise.std().item() - 0.5) < 0.01 and cells.Normal(0.5).mean == 0
    with pytest.raises(ValueError, match=r"Bernoulli's p must be in \[0, 1\], got 1.5"):
        cells.Bernoulli(1.5)
    with pytest.raises(ValueError, match="Normal's std must be at least 0, got -1"):
        cells.Normal(-1)


def test_a_function_without_rec_has_no_recurrent_matrix():
    net = net_of(cells.independent, 2, weight=torch.nn.Parameter(torch.ones(H)))
    names = {"weight_ih", "bias_ih", "weight"}
    assert set(net.state_dict()) == {f"{name}_l{layer}" for name in names for layer in (0, 1)}
    net(data(3, 2, 3))


def test_results_that_are_less_than_the_state():
    """A constant, and a value that every unit shares."""

    @fastbptt.cell(gates=1, states=3)
    def odd(pre, rec, state, t):
        return pre[0] + rec[0], 1, 2 * t

    net = net_of(odd, t="t")
    _, last = net(data(5, 2, 3), t=data(5, 2, 1))
    assert all(state.shape == (1, 2, H) for state in last)
    assert torch.equal(last[1], torch.ones(1, 2, H, dtype=torch.float64))
    torch.testing.assert_close(last[2][0], 2 * data(5, 2, 1)[4].expand(2, H))


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_file])
def test_copies(through):
    net = net_of(two, 2, a=cells.Bernoulli(0.5), b=torch.nn.Parameter(torch.rand(H)), truncation=2)
    net.eval()
    x = data(5, 2, 3)
    other = through(net)
    assert torch.equal(other(x)[0], net(x)[0]) and other.cell is two
    assert repr(other) == repr(net)
    with torch.no_grad():
        other.weight_hh_l0.zero_()
    assert net.weight_hh_l0.abs().min() > 0


def test_a_local_cell_is_not_pickled():
    @fastbptt.cell(gates=1, states=1)
    def local(pre, rec, state):
        return (torch.tanh(pre[0] + rec[0]),)

    with pytest.raises((AttributeError, pickle.PicklingError), match="local"):
        through_pickle(net_of(local))


def test_repr():
    net = net_of(two, 2, a="mask", dropout=0.1, bidirectional=True, truncation=3)
    assert repr(net) == (
        "Recurrent(two, 3, 4, num_layers=2, dropout=0.1, bidirectional=True, "
        "truncation=Chunked(k=3), a='mask', b=0.5)"
    )
    net = net_of(two, bias=False, batch_first=True, a=torch.zeros(H), b=cells.Normal(1.0))
    assert repr(net) == (
        "Recurrent(two, 3, 4, bias=False, batch_first=True, a=<4 parameters>, "
        "b=Normal(std=1.0, per_sequence=False))"
    )


def test_autocast():
    """The products are autocast; the states keep their dtype, so that small steps are not lost."""
    torch.manual_seed(0)
    net = Recurrent(cells.leaky, 3, H, alpha=0.001)
    x = torch.randn(200, 2, 3)
    exact, last = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        output, last = net(x)
        every = net(x.bfloat16(), return_states=True)[2]
    assert output.dtype == last.dtype == every.dtype == torch.float32
    assert not torch.equal(output, exact)
    torch.testing.assert_close(output, exact, rtol=0.02, atol=1e-3)
    output.sum().backward()
    assert net.weight_hh_l0.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # also where the function gives 16 bits
        output, last = Recurrent(cells.elman, 3, H)(x)
    assert output.dtype == last.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    net = net_of(two, a=0.3).to(dtype)
    output, last = net(data(4, 2, 3).to(dtype))
    assert output.dtype == dtype and {state.dtype for state in last} == {dtype}
    expected = net_of(two, a=0.3)(data(4, 2, 3))[0]
    torch.testing.assert_close(output.double(), expected, rtol=0.05, atol=0.02)


def test_transforms():
    net = net_of(two, a="a")
    x, a = data(7, 4, 2, 3), data(7, 4, 2, 1)
    parameters = dict(net.named_parameters())

    def loss(parameters, x, a):
        output = torch.func.functional_call(net, parameters, (x,), {"a": a, "truncation": 2})[0]
        return output.square().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, a)
    for i in range(7):
        own = torch.autograd.grad(loss(parameters, x[i], a[i]), list(parameters.values()))
        for name, gradient in zip(parameters, own, strict=True):
            torch.testing.assert_close(got[name][i], gradient)


def test_randomized_is_drawn_once_and_kept():
    truncation = fastbptt.Randomized(pi=0.5, per_sequence=True)
    net, x = net_of(two, a=0.3), data(6, 3, 3)
    got = torch.autograd.grad(net(x, truncation=truncation)[0].sum(), net.weight_hh_l0)[0]
    again = net(x, truncation=truncation.last)[0].sum()
    torch.testing.assert_close(torch.autograd.grad(again, net.weight_hh_l0)[0], got, rtol=0, atol=0)


ERRORS = {
    "no cell": (lambda: Recurrent(torch.tanh, 3, H), TypeError, "cell must be a function decorat"),
    "size": (lambda: Recurrent(two, 0, H, a=1), ValueError, "input_size must be at least 1, got 0"),
    "hidden": (lambda: Recurrent(two, 3, 4.0, a=1), TypeError, "hidden_size must be an int, got 4"),
    "layers": (lambda: Recurrent(two, 3, H, 0, a=1), ValueError, "num_layers must be at least 1"),
    "dropout": (lambda: net_of(a=1, dropout=2), ValueError, "dropout must be a number from 0 to 1"),
    "truncation": (lambda: net_of(a=1, truncation="x"), TypeError, "truncation must be None, an"),
    "unknown": (lambda: net_of(a=1, c=2), TypeError, "two has no argument 'c'; it has a, b"),
    "missing": (lambda: net_of(b=1), TypeError, "two needs a, which is not given"),
    "bool": (lambda: net_of(a=True), TypeError, "a must be a number, a Tensor .* got True"),
    "shape": (
        lambda: net_of(a=torch.ones(3)),
        ValueError,
        r"a must .* have shape \(4,\), .* \(3,\)",
    ),
    "integers": (lambda: net_of(a=torch.ones(4).int()), ValueError, "must be floating point"),
    "taken": (lambda: net_of(a="resets"), ValueError, "name of an input per step .* got 'resets'"),
    "no name": (lambda: net_of(a="a b"), ValueError, "name of an input per step .* got 'a b'"),
}
X = data(5, 2, 3)


def call(*args, options=None, **kwargs):
    def calls():
        net_of(two, **{"a": "a", **(options or {})})(*args, **kwargs)

    return calls


ERRORS |= {
    "not given": (call(X), TypeError, "two needs an input per step 'a' in each call"),
    "not known": (call(X, a=1, c=1), TypeError, "two has no input per step 'c'"),
    "a number is no input": (call(X, a=1, b=1), TypeError, "two has no input per step 'b'"),
    "steps": (
        call(X, a=data(4, 2, 1)),
        ValueError,
        r"a must have a value for each of 5 steps.*4, 2",
    ),
    "units": (call(X, a=data(5, 2, 3)), ValueError, r"a must have .* got shape \(5, 2, 3\)"),
    "layers of it": (call(X, a=data(2, 5, 2, 1)), ValueError, "a must have .* with 1 of them"),
    "dimensions": (call(X, a=data(5, 2)), ValueError, r"a must have .* got shape \(5, 2\)"),
    "no tensor": (call(X, a=[1.0]), TypeError, "a must be a number, a Tensor or a PackedSequence"),
    "packed": (
        call(X, a=pack_padded_sequence(data(5, 2, 1), [5, 2])),
        ValueError,
        "a must be a Tensor as input is",
    ),
    "features": (call(data(5, 2, 4), a=1), RuntimeError, "Expected 3, got 4"),
    "dtype": (call(X.float(), a=1), ValueError, "does not match weight dtype"),
    "4-D": (call(X[None], a=1), ValueError, "Expected input to be 2D or 3D, got 4D"),
    "list": (call([X], a=1), TypeError, "input must be a Tensor or a PackedSequence, got list"),
    "no steps": (call(X[:0], a=1), RuntimeError, "input must have at least 1 step, got 0"),
    "one state": (call(X, data(1, 2, H), a=1), TypeError, "a tuple of 2 Tensors, .* got Tensor"),
    "three": (call(X, (data(1, 2, H),) * 3, a=1), TypeError, "a tuple of 2 Tensors, .* got 3 of"),
    "state": (call(X, (data(1, 2, H), None), a=1), TypeError, "hx must hold a Tensor for each"),
    "first state": (
        call(X, (data(2, 2, H),) * 2, a=1),
        RuntimeError,
        r"hidden\[0\] size \(1, 2, 4",
    ),
    "second": (
        call(X, (data(1, 2, H), data(1, 2, 5)), a=1),
        RuntimeError,
        r"hidden\[1\] size \(1, 2, 4\), got \[1, 2, 5\]",
    ),
    "resets": (call(X, a=1, resets=torch.zeros(5)), TypeError, "resets must have dtype torch.bool"),
    "no resets": (call(X, a=1, resets=[True] * 5), TypeError, "resets must be a bool tensor"),
    "resets' shape": (
        call(X, a=1, resets=torch.zeros(2, 5).bool()),
        ValueError,
        r"resets must have shape \(5,\) or \(5, 2\), got \(2, 5\)",
    ),
    "gates": (
        call(X, a=1, truncation=fastbptt.Gated(torch.ones(4))),
        ValueError,
        r"kappa must have shape \(5,\) or \(5, 2\), got \(4,\)",
    ),
    "call's truncation": (call(X, a=1, truncation=0), ValueError, "truncation must be at least 1"),
    "both ways": (
        call(X, a=1, truncation=fastbptt.Sliding(2), options={"bidirectional": True}),
        ValueError,
        "windows that overlap",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    what, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        what()


def test_three_states_are_checked():
    net = net_of(cells.dropout_lstm, mask=1.0)
    with pytest.raises(
        RuntimeError, match=r"Expected hidden\[2\] size \(1, 2, 4\), got \[1, 3, 4\]"
    ):
        net(X, (data(1, 2, H), data(1, 2, H), data(1, 3, H)))
