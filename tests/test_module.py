"""The module around the recurrence: its state, its options, what autograd may ask of it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastbptt
from common import Case, assert_matches, cotangent, referee, step, surrounded, twin
from fastbptt import Chunked

pytestmark = pytest.mark.usefixtures("poisoned")

STACK = Case(6, 3, 4, 5, layers=2, bidirectional=True)


@pytest.mark.parametrize("bias", [False, True], ids="bias={}".format)
def test_state_dict_goes_both_ways(bias):
    options = {"num_layers": 2, "bidirectional": True, "bias": bias}
    ours, theirs = fastbptt.RNN(4, 5, **options), torch.nn.RNN(4, 5, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_matches(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0)
    fresh = torch.nn.RNN(4, 5, **options)
    fresh.load_state_dict(ours.state_dict(), strict=True)
    assert_matches(dict(fresh.state_dict()), dict(ours.state_dict()), rtol=0)
    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(ours(x)[0], fresh(x)[0])
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.load_state_dict(fastbptt.RNN(4, 6, **options).state_dict())


def test_same_seed_same_initialisation():
    torch.manual_seed(3)
    ours = fastbptt.RNN(4, 5, 2, "relu", bidirectional=True)
    torch.manual_seed(3)
    theirs = torch.nn.RNN(4, 5, 2, "relu", bidirectional=True)
    assert_matches(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0)


def test_is_not_an_nn_rnn_but_an_rnn_base():
    # torch.compile refuses instances of nn.RNN, subclasses too.
    assert issubclass(fastbptt.RNN, torch.nn.RNNBase)
    assert not issubclass(fastbptt.RNN, torch.nn.RNN)


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, through_pickle, through_file])
def test_copies(clone):
    module = STACK.module(truncation=3)
    expected = step(module, *STACK.data())  # after a call: whatever it keeps must be copied too
    other = clone(module)
    assert other.truncation == Chunked(3) and repr(other) == repr(module)
    assert_matches(step(other, *STACK.data()), expected, rtol=0)
    assert_matches(step(module, *STACK.data()), expected, rtol=0)


def test_repr():
    assert repr(fastbptt.RNN(4, 5)) == "RNN(4, 5)"
    text = repr(fastbptt.RNN(4, 5, 2, truncation=7, batch_first=True))
    assert "4, 5, num_layers=2, batch_first=True" in text and "truncation=Chunked(k=7)" in text


def test_positional_arguments_are_torchs():
    ours = fastbptt.RNN(4, 5, 2, "relu", False, True, 0.25, True)
    theirs = torch.nn.RNN(4, 5, 2, "relu", False, True, 0.25, True)
    for name in (*torch.nn.RNNBase.__constants__, "nonlinearity"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize("truncation", [None, 2])
def test_dropout(p, truncation):
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    torch.manual_seed(0)
    module = fastbptt.RNN(6, 32, 3, dropout=p, dtype=torch.float64, truncation=truncation)
    no_dropout = fastbptt.RNN(6, 32, 3, dtype=torch.float64, truncation=truncation)
    no_dropout.load_state_dict(module.state_dict())
    assert_matches(step(module.eval(), x), step(no_dropout, x), rtol=0)

    # In training a mask lies between layers, and none after the last: by hand, layer by layer.
    # The masks are torch's, drawn in order from its generator, so the seed gives them.
    module.train()
    layers = [fastbptt.RNN(n, 32, dtype=torch.float64, truncation=truncation) for n in (6, 32, 32)]
    for i, layer in enumerate(layers):
        values = {n: getattr(module, n.replace("_l0", f"_l{i}")) for n in layer.state_dict()}
        layer.load_state_dict(values)

    def by_hand(x, hx=None):
        finals = []
        for i, layer in enumerate(layers):
            if i > 0:
                x = torch.nn.functional.dropout(x, p, training=True)
            x, h_n = layer(x)
            finals.append(h_n)
        return x, torch.cat(finals)

    def outputs_and_dinput(call):
        torch.manual_seed(7)
        got = step(module, x, call=call)
        return {name: got[name] for name in ("output", "h_n", "dinput")}

    assert_matches(outputs_and_dinput(module), outputs_and_dinput(by_hand))
    if truncation is None:
        assert_matches(outputs_and_dinput(module), outputs_and_dinput(twin(module)))


def test_replaced_parameters_are_used():
    module, other = STACK.module(), STACK.module()
    torch.manual_seed(9)
    new = {n: torch.nn.Parameter(torch.randn_like(p)) for n, p in module.named_parameters()}
    for name, value in new.items():
        setattr(module, name, value)
    expected = step(twin(module), *STACK.data())
    assert_matches(step(module, *STACK.data()), expected)

    def call(x, hx):
        return torch.func.functional_call(other, dict(module.named_parameters()), (x, hx))

    assert_matches(step(module, *STACK.data(), call=call), expected)


def test_parameters_of_another_dtype_for_one_call():
    single = Case(dtype=torch.float32).module()
    double = {n: p.detach().double() for n, p in single.named_parameters()}
    arguments = Case().data()
    output, h_n = torch.func.functional_call(single, double, arguments)
    expected = twin(Case(dtype=torch.float32).module()).double()(*arguments)
    assert_matches({"output": output, "h_n": h_n}, {"output": expected[0], "h_n": expected[1]})


@pytest.mark.parametrize("truncation", [None, 2])
def test_weight_norm(truncation):
    case = Case(6, 3, 4, 5)
    ours, theirs = case.module(truncation=truncation), twin(case.module())
    for module in (ours, theirs):
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    x, h = case.data()
    for _ in range(3):
        grads = []
        for module in (ours, theirs):
            module.zero_grad()
            if truncation is None or module is ours:
                output, h_n = module(x, h)
            else:
                output, h_n = fastbptt.reference.run(module, x, h, truncation=truncation)
            (output.sin().sum() + h_n.sum()).backward()
            grads.append({n: p.grad.clone() for n, p in module.named_parameters()})
            torch.optim.SGD(module.parameters(), lr=0.1).step()
        assert_matches(*grads)


def test_cast_and_move():
    module = Case(dtype=torch.float32).module()
    x = torch.randn(5, 3, 3)
    before = module(x)[0]
    assert module.double()(x.double())[0].dtype == torch.float64
    assert torch.equal(module.float()(x)[0], before)
    shapes = [t.shape for t in module.to("meta")(x.to("meta"))]
    assert shapes == [t.shape for t in twin(module)(x.to("meta"))]


# What is asked of autograd.


@pytest.mark.parametrize("truncation", [None, 4], ids="truncation={}".format)
@pytest.mark.parametrize("through", [("output",), ("h_n",)], ids=str)
def test_through_one_output(through, truncation):
    for lengths in (None, (6, 2, 4)):
        case = Case(6, 3, 4, 5, 2, True, lengths=lengths)
        double, call = referee(case.module(), truncation)
        expected = step(double, *case.data(), through=through, call=call)
        module = case.module(truncation=truncation)
        assert_matches(step(module, *case.data(), through=through), expected)


def test_gradients_only_where_asked_for():
    module = STACK.module(truncation=4)
    x, h = STACK.data()
    full = step(module, x, h)
    names = [n for n, _ in module.named_parameters()]
    wanted = [{"dinput"}, {"dhx"}, {"d" + n for n in names}, {"dweight_hh_l1"}]
    wanted += [{"dinput", "dbias_ih_l0_reverse"}, {"dhx", "dweight_ih_l0"}]
    for some in wanted:
        module.zero_grad()
        leaves = {"dinput": x.clone(), "dhx": h.clone()}
        leaves |= {"d" + n: p for n, p in module.named_parameters()}
        for name, t in leaves.items():
            t.requires_grad_(name in some)
        outputs = module(leaves["dinput"], leaves["dhx"])
        torch.autograd.backward(outputs, [cotangent(t, i) for i, t in enumerate(outputs)])
        got = {n: t.grad for n, t in leaves.items() if t.grad is not None}
        assert_matches(got, {n: full[n] for n in some})


def test_no_gradient():
    module = STACK.module().requires_grad_(False)
    x, h = STACK.data()
    output, h_n = module(x, h)
    assert not output.requires_grad and not h_n.requires_grad
    module.requires_grad_(True)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            silent, silent_h = module(x, h)
        assert not silent.requires_grad
        assert torch.equal(silent, output) and torch.equal(silent_h, h_n)


def test_retained_graph_gives_the_same_again():
    module = STACK.module(truncation=3)
    x, h = (t.requires_grad_() for t in STACK.data())
    leaves = [x, h, *module.parameters()]
    loss = module(x, h)[0].sin().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


def test_gradients_accumulate():
    module = STACK.module()
    x, h = STACK.data()
    once = step(module, x, h)
    output, h_n = module(x, h)
    torch.autograd.backward([output, h_n], [cotangent(output, 0), cotangent(h_n, 1)])
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter.grad, 2 * once["d" + name]), name


@pytest.mark.parametrize("truncation", [None, 3], ids="truncation={}".format)
def test_second_derivatives_are_refused(truncation):
    module = STACK.module(truncation=truncation)
    x, h = (t.requires_grad_() for t in STACK.data())
    loss = module(x, h)[0].square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|differentiat.* twice"):
        dx.sum().backward()


@pytest.mark.parametrize("victim", ["input", "hx", "output", "weight_hh_l0"])
def test_a_saved_tensor_changed_in_place_is_noticed(victim):
    module = STACK.module()
    x, h = STACK.data()
    output, h_n = module(x, h)
    tensors = {"input": x, "hx": h, "output": output, "weight_hh_l0": module.weight_hh_l0}
    with torch.no_grad():
        tensors[victim].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (output.sum() + h_n.sum()).backward()


def test_outputs_share_no_memory_with_arguments():
    module = Case(1, 2, 3, 4).module()
    x, h = Case(1, 2, 3, 4).data()
    output, h_n = module(x, h)
    x_before, h_before = x.clone(), h.clone()
    with torch.no_grad():
        h_n.zero_()
        assert output.any(), "h_n is a view of output"
        output.zero_()
    assert torch.equal(x, x_before) and torch.equal(h, h_before)


def test_checkpoint_and_saved_tensor_hooks():
    module = STACK.module(truncation=3)
    expected = step(module, *STACK.data())

    def checkpointed(x, h):
        return checkpoint(module, x, h, use_reentrant=False)

    assert_matches(step(module, *STACK.data(), call=checkpointed), expected, rtol=0)
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone()

    def hooked(x, h):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return module(x, h)

    assert_matches(step(module, *STACK.data(), call=hooked), expected, rtol=0)
    assert packed


# What lies in memory.


@pytest.mark.parametrize("contiguous", [True, False], ids="contiguous={}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_surrounding_memory_is_not_read(dtype, contiguous, isa):
    for B, H, k in [(3, 5, None), (13, 33, 4), (1, 70, None), (1, 64, 3), (6, 130, None)]:
        case = Case(7, B, 6, H, 2, bidirectional=True, dtype=dtype)
        module = case.module(truncation=k)
        expected = step(module, *case.data())
        for name, parameter in module.named_parameters():
            setattr(module, name, torch.nn.Parameter(surrounded(parameter, contiguous)))
        x, h = (surrounded(t, contiguous).requires_grad_() for t in case.data())
        output, h_n = module(x, h)
        torch.autograd.backward(
            [output, h_n],
            [surrounded(cotangent(t, seed), contiguous) for seed, t in enumerate((output, h_n))],
        )
        actual = {"output": output, "h_n": h_n, "dinput": x.grad, "dhx": h.grad}
        actual |= {"d" + n: p.grad for n, p in module.named_parameters()}
        # Another stride may mean another order of summation in a GEMM, so: to rounding.
        assert_matches(actual, expected, rtol=16 * torch.finfo(dtype).eps)


def test_expanded_and_transposed_arguments():
    case = Case(6, 4, 3, 5, 1)
    module = case.module(truncation=4)
    other, call = referee(module, 4)
    x, h = case.data()
    for x_view, h_view in [
        (x[:, :1].expand(6, 4, 3), h[:, :1].expand(1, 4, 5)),
        (x.transpose(0, 1).contiguous().transpose(0, 1), h.mT.contiguous().mT),
        (x.flip(0)[::2], h),
        (x[..., :1].expand(6, 4, 3), h),
    ]:
        grads = []
        for m, f in ((module, module), (other, call)):
            m.zero_grad()
            output, h_n = f(x_view, h_view)
            output.sum().backward()  # an expanded gradient: stride 0 everywhere
            grads.append({n: p.grad.clone() for n, p in m.named_parameters()} | {"output": output})
        assert_matches(*grads)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_spread_as_in_torch(value, nonlinearity, isa):
    for B, H in [(3, 5), (1, 64), (13, 33)]:
        case = Case(6, B, 4, H, nonlinearity=nonlinearity)
        module = case.module()
        x, h = case.data()
        x[2, 0, 1] = value
        h[0, B - 1, 0] = value
        actual, expected = step(module, x, h), step(twin(module), x, h)
        for name in expected:
            torch.testing.assert_close(
                actual[name], expected[name], rtol=1e-11, atol=1e-11, equal_nan=True, msg=name
            )


def test_empty_batch():
    for batch_first in (False, True):
        case = Case(5, 0, 3, 4, 2, True, batch_first)
        module = case.module(truncation=2)
        actual = step(module, *case.data())
        assert_matches(actual, step(twin(module), *case.data()))
        for name, parameter in module.named_parameters():
            assert torch.equal(actual["d" + name], torch.zeros_like(parameter)), name


def test_autocast():
    case = Case(6, 3, 4, 5, dtype=torch.float32)
    module = case.module()
    x, h = case.data()
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = module(x, h), twin(module)(x, h)
    truth = fastbptt.reference.run(module, x, h)
    for a, e, t in zip(actual, expected, truth, strict=True):
        assert (a - t).abs().max() <= 2 * (e - t).abs().max() + 4 * torch.finfo(t.dtype).eps
