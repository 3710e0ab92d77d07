"""torch.func's transforms, and torch.autograd's, of modules and functional forms."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils._pytree import tree_leaves

import fastbptt
from calls import Call
from common import Case, assert_matches, cotangent, parts, python, tensors_of, twin, whole
from fastbptt import TBPTT, Chunked, Gated, Sliding
from orders import function_of, leaves_of
from test_modes import MODES, random_call

CASES = [
    Case(3, 2, 2, 2, 2),
    Case(2, 2, 1, 2, 2, True, bias=False, batch_first=True, cell="gru"),
    Case(3, 2, 2, 3, 1, bias=False, cell="lstm", proj=2),
    Case(2, None, 1, 2, 1, True, hx=False, cell="lstm"),
    Case(3, 2, 2, 2, 2, True, lengths=(2, 3), cell="tanh"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def loss_of(module, case: Case):
    """The loss as a function of the weights and the input's data."""
    x, hx = case.data()

    def loss(weights, data):
        input = type(x)(data, *x[1:]) if case.lengths else data
        results = tensors_of(functional_call(module, weights, (input, hx)))
        return sum(result.sin().square().sum() for result in results)

    return loss


class ByLoops(torch.nn.RNNBase):
    """A module by the reference: torch's own takes no packed input in a transform."""

    forward = fastbptt.reference.run


def peer_of(module, case: Case):
    peer = twin(module)
    if case.lengths:
        peer.__class__ = ByLoops
    return peer


def both(case: Case):
    """Ours and torch's loss, and where to take derivatives of them."""
    module = case.module()
    weights = {name: p.detach() for name, p in module.named_parameters()}
    data = tensors_of((case.data()[0], None))[0]
    return loss_of(module, case), loss_of(peer_of(module, case), case), weights, data


def assert_same(found, expected, rtol: float = 1e-10) -> None:
    found, expected = (dict(enumerate(tree_leaves(values))) for values in (found, expected))
    assert_matches(found, expected, rtol)


@every_case
def test_first_derivatives(case):
    ours, theirs, weights, data = both(case)
    tangents = {name: cotangent(w, i) for i, (name, w) in enumerate(weights.items())}
    along = (tangents, cotangent(data, 9))
    assert_same(grad(ours, (0, 1))(weights, data), grad(theirs, (0, 1))(weights, data))
    value, pull = vjp(ours, weights, data)
    assert_same(pull(torch.ones_like(value)), grad(theirs, (0, 1))(weights, data))
    expected = jvp(theirs, (weights, data), along)
    assert_same(jvp(ours, (weights, data), along), expected)
    if case.lengths is None:  # the lengths are data, which its trace must not look at
        value, push = linearize(ours, weights, data)
        assert_same((value, push(*along)), expected)


@pytest.mark.parametrize(
    "truncation", [Chunked(2), TBPTT(1, 2), TBPTT(2, 2, "last"), Sliding(2)], ids=str
)
def test_linearized_windows(truncation):
    module = CASES[0].module(truncation=truncation)
    x, _ = CASES[0].data()
    along = cotangent(x, 1)
    value, push = linearize(lambda x: module(x)[0], x)
    assert_same((value, push(along)), jvp(lambda x: module(x)[0], (x,), (along,)))


def outputs_of(loss):
    """Instead of the loss, numbers that it is the sum of, for Jacobians."""
    return lambda weights, data: torch.stack([loss(weights, data * s) for s in (1.0, 2.0, 3.0)])


@every_case
def test_jacobians(case):
    ours, theirs, weights, data = both(case)
    ours, theirs = outputs_of(ours), outputs_of(theirs)
    expected = jacrev(theirs, (0, 1))(weights, data)
    assert_same(jacrev(ours, (0, 1))(weights, data), expected)
    assert_same(jacfwd(ours, (0, 1))(weights, data), expected)


@pytest.mark.slow(1)
@every_case
def test_hessians(case):
    ours, theirs, weights, data = both(case)
    for argument in (0, 1):
        expected = jacrev(jacrev(theirs, argument), argument)(weights, data)
        for transform in (
            lambda f, i: hessian(f, i),
            lambda f, i: jacrev(jacrev(f, i), i),
            lambda f, i: jacrev(jacfwd(f, i), i),
        ):
            assert_same(transform(ours, argument)(weights, data), expected)


@every_case
def test_nested_maps(case):
    """The gradient, and a tangent, of a sum over samples' gradients; maps in maps."""
    ours, theirs, weights, data = both(case)
    samples = torch.stack([torch.stack([data * a + b for a in (1, 2)]) for b in (0, 1, 2)])

    def spread(loss):
        return lambda weights, data: sum(
            g.square().sum() for g in vmap(grad(loss), (None, 0))(weights, data).values()
        )

    def by_loop(weights, data):
        each = (grad(theirs)(weights, sample) for sample in data)
        return sum(g.square().sum() for of_one in each for g in of_one.values())

    first = samples[0]
    expected = grad(by_loop, (0, 1))(weights, first)
    assert_same(grad(spread(ours), (0, 1))(weights, first), expected)
    tangents = {name: cotangent(w, i) for i, (name, w) in enumerate(weights.items())}
    along = sum((g * tangents[name]).sum() for name, g in expected[0].items())
    found = jvp(lambda w: spread(ours)(w, first), (weights,), (tangents,))
    assert_same(found, (by_loop(weights, first), along))
    rows = vmap(grad(spread(ours)), (None, 0))(weights, samples)
    assert_same(rows, stacked([grad(by_loop)(weights, sample) for sample in samples]))


def stacked(each: list):
    return torch.utils._pytree.tree_map(lambda *tensors: torch.stack(tensors), *each)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_samples(mode, seed):
    """vmap of grad over inputs and states equals a loop of calls, whatever is truncated."""
    call = random_call(mode, 3000 + seed)
    call = Call(call.case, call.truncation, call.resets, through=call.through)
    module = call.module()
    leaves, input = leaves_of(call, module)
    names = [name for name in ("hx", "cx") if name in leaves]
    weights = {name: leaves[name].detach() for name, _ in module.named_parameters()}
    options = {"truncation": call.make_truncation(), "resets": call.make_resets()}
    if isinstance(options["truncation"], fastbptt.Randomized):  # the same gates for every sample
        T, B = call.case.T, call.case.B or 1
        options["truncation"] = options["truncation"].draw(T, B)

    results = tensors_of(module(input, whole([leaves[name] for name in names])))
    cotangents = [cotangent(result, i).detach() for i, result in enumerate(results)]

    def loss(weights, x, *states):
        given = type(input)(x, *input[1:]) if isinstance(input, tuple) else x
        results = functional_call(module, weights, (given, whole(states)), options)
        return sum((r * g).sum() for r, g in zip(tensors_of(results), cotangents, strict=True))

    generator = torch.Generator().manual_seed(seed)
    samples = [
        torch.randn(3, *leaves[name].shape, generator=generator, dtype=torch.float64)
        for name in ("x", *names)
    ]
    arguments = tuple(range(1 + len(samples)))
    found = vmap(grad(loss, arguments), (None, *[0] * len(samples)))(weights, *samples)
    one_by_one = [grad(loss, arguments)(weights, *each) for each in zip(*samples, strict=True)]
    assert_same(found, stacked(one_by_one))


@pytest.mark.parametrize("cls", [fastbptt.RNN, fastbptt.GRU, fastbptt.LSTM])
def test_ensemble(cls):
    torch.manual_seed(0)
    nets = [cls(2, 3, 2, dtype=torch.float64) for _ in range(8)]
    weights, buffers = stack_module_state(nets)
    x = torch.randn(8, 4, 2, 2, dtype=torch.float64)

    def loss(weights, x):
        output, last = functional_call(nets[0], (weights, buffers), (x,))
        return output.square().sum() + sum(state.sum() for state in parts(last))

    for dims, data in ((0, x), (None, x[0])):
        found = vmap(grad(loss), (0, dims))(weights, data)
        each = data if dims == 0 else [data] * 8
        own = [{n: p.detach() for n, p in net.named_parameters()} for net in nets]
        assert_same(found, stacked([grad(loss)(w, x) for w, x in zip(own, each, strict=True)]))


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("truncation", [None, 2, TBPTT(1, 2, "last"), Sliding(2)], ids=str)
def test_functional_forms(cell, truncation):
    """They are differentiated as modules are."""
    case = Case(4, 2, 2, 3, cell=cell)
    call = Call(case, Chunked(truncation) if isinstance(truncation, int) else truncation)
    module = call.module()
    weights = {name.removesuffix("_l0"): p.detach() for name, p in module.named_parameters()}
    x, hx = case.data()
    function = {"gru": fastbptt.gru, "lstm": fastbptt.lstm}.get(cell, fastbptt.rnn)

    def by_form(weights, x):
        states = whole([state[0] for state in parts(hx)])
        output, last = function(x, states, **weights, truncation=truncation)
        return output.sin().sum() + sum(state.square().sum() for state in parts(last))

    def by_module(weights, x):
        named = {name + "_l0": w for name, w in weights.items()}
        output, last = functional_call(module, named, (x, hx), {"truncation": truncation})
        return output.sin().sum() + sum(state.square().sum() for state in parts(last))

    assert_same(grad(by_form)(weights, x), grad(by_module)(weights, x))
    assert_same(hessian(by_form, 1)(weights, x), hessian(by_module, 1)(weights, x))
    samples = torch.stack([x, 2 * x])
    found = vmap(grad(by_form), (None, 0))(weights, samples)
    assert_same(found, stacked([grad(by_module)(weights, sample) for sample in samples]))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_gradients_of_many_losses(case, create_graph):
    """is_grads_batched, vmap of torch.autograd.grad, and Jacobians by them: as one by one."""
    call = Call(case, Chunked(2))
    module = call.module()
    leaves, input = leaves_of(call, module)
    output, _ = function_of(call, module)(input, None)
    losses = torch.stack([cotangent(output, i) for i in range(3)])
    options = {"retain_graph": True, "create_graph": create_graph}
    wanted = [leaves["x"], *module.parameters()]

    def gradients(loss):
        return torch.autograd.grad(output, wanted, loss, **options)

    expected = stacked([gradients(loss) for loss in losses])
    batched = torch.autograd.grad(output, wanted, losses, is_grads_batched=True, **options)
    for found in (batched, vmap(gradients)(losses)):
        assert_same([f.detach() for f in found], [e.detach() for e in expected])
    if create_graph:
        twice = (
            torch.autograd.grad(sum(d.square().sum() for d in each), wanted, retain_graph=True)
            for each in (batched, expected)
        )
        assert_same(*twice)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_vectorized_jacobian(case, strategy):
    module = case.module()
    x, hx = case.data()

    def outputs(x, *states):
        return tensors_of(module(x, whole(states)))

    jacobian = torch.autograd.functional.jacobian
    inputs = (x, *parts(hx))
    found = jacobian(outputs, inputs, vectorize=True, strategy=strategy)
    assert_same(found, jacobian(outputs, inputs))


def test_dropout_in_maps():
    net = fastbptt.GRU(2, 16, 2, dropout=0.5, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64)
    same = x.expand(3, *x.shape)

    def outputs(x):
        return net(x)[0]

    with pytest.raises(RuntimeError, match="random operation while in randomness error mode"):
        vmap(outputs)(same)
    torch.manual_seed(1)
    expected = outputs(x)
    torch.manual_seed(1)
    for output in vmap(outputs, randomness="same")(same):
        assert_matches({"": output}, {"": expected})
    one, two, three = vmap(outputs, randomness="different")(same)
    assert not torch.equal(one, two) and not torch.equal(two, three)
    torch.manual_seed(1)  # and outside of maps the masks are the module's own
    assert_same(jvp(outputs, (x,), (x,))[0], expected)


def test_maps_over_gates_and_resets():
    case = Case(4, 2, 2, 3, cell="lstm")
    module, (x, hx) = case.module(), case.data()
    resets = torch.rand(3, 4, 2) < 0.4
    kappa = torch.rand(3, 4, 2).round(decimals=1)

    def loss(x, resets, kappa):
        return module(x, hx, truncation=Gated(kappa), resets=resets)[0].square().sum()

    found = vmap(grad(loss), (None, 0, 0))(x, resets, kappa)
    assert_same(
        found, torch.stack([grad(loss)(x, r, k) for r, k in zip(resets, kappa, strict=True)])
    )


@pytest.mark.slow(1)
@pytest.mark.parametrize(
    ("cell", "layout"),
    [
        *((cell, {"lengths": (2, 3)}) for cell in ("tanh", "gru", "lstm")),
        ("gru", {}),
        ("lstm", {"batch_first": True}),
    ],
)
def test_third_derivatives(cell, layout):
    case = Case(3, 2, 2, 3, 2, True, cell=cell, **layout)
    ours, theirs, weights, data = both(case)
    along = cotangent(data, 9)

    def third(loss):
        def product(x):
            return (grad(loss, 1)(weights, x) * along).sum()

        return grad(lambda x: grad(product)(x).square().sum())(data)

    def bend(loss):
        """The tangent of the tangent of the gradient."""

        def gradient(x):
            return grad(loss, 1)(weights, x)

        def tangent(x):
            return jvp(gradient, (x,), (along,))[1]

        return jvp(tangent, (data,), (along,))[1]

    def by_autograd(loss):
        x = data.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(weights, x), x, create_graph=True)
        (second,) = torch.autograd.grad((first * along).sum(), x, create_graph=True)
        return torch.autograd.grad(second.square().sum(), x)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(third(ours), third(theirs))
        assert_same(by_autograd(ours), third(theirs))
        found = jacfwd(jacfwd(ours, 1), 1)(weights, data)  # tangents of tangents
        assert_same(found, jacrev(jacrev(theirs, 1), 1)(weights, data))
        assert_same(bend(ours), bend(theirs))


@pytest.mark.slow
def test_third_derivatives_warn_once():
    script = """
import warnings, torch, fastbptt
from torch.func import grad
net, x = fastbptt.GRU(2, 3), torch.randn(3, 1, 2)
f = lambda x: net(x)[0].sin().sum()
g = lambda x: grad(f)(x).sin().sum()
h = lambda x: grad(g)(x).sin().sum()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    grad(g)(x)
    assert not caught, caught[0].message
    for _ in range(2):
        grad(h)(x)
print(*(each.message for each in caught), sep="\\n")
"""
    (line,) = python(script).stdout.splitlines()
    assert line.startswith("fastbptt computes third derivatives by plain PyTorch loops")


@pytest.mark.parametrize("truncation", [None, TBPTT(1, 3)], ids=str)
def test_maps_over_a_second_backward_pass(truncation):
    """Of a graph from outside the map, by either of torch's maps: as one by one."""
    torch.manual_seed(0)
    module = fastbptt.LSTM(3, 4, 2, dtype=torch.float64, truncation=truncation)
    input = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    output, _ = module(input)
    (gradient,) = torch.autograd.grad(output, input, torch.randn_like(output), create_graph=True)
    wanted = [input, *module.parameters()]

    def second(cotangent: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(gradient, wanted, cotangent, retain_graph=True)

    cotangents = torch.randn(4, *input.shape, dtype=torch.float64)
    one_by_one = [torch.stack(each) for each in zip(*map(second, cotangents), strict=True)]
    options = {"retain_graph": True, "is_grads_batched": True}
    batched = torch.autograd.grad(gradient, wanted, cotangents, **options)
    for found in (torch.func.vmap(second)(cotangents), batched):
        torch.testing.assert_close(found, tuple(one_by_one), rtol=1e-10, atol=1e-12)
