"""How exact: finite differences in float64, and float32's error against torch's own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

import fastbptt
from common import SHAPES, Case, assert_as_exact, detach_loop, referee, step, twin

# A truncated gradient is the derivative of no function, so finite differences say nothing of it;
# test_truncation holds it against loops that detach. k >= T truncates nothing: it is checked here.


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "identity"])
@pytest.mark.parametrize("lengths", [None, (3, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("k", [None, 3], ids="k={}".format)
def test_gradcheck_module(k, lengths, nonlinearity):
    for case in (
        Case(3, 2, 2, 2, 2, True, lengths=lengths, nonlinearity=nonlinearity),
        Case(3, 2, 2, 3, 2, batch_first=True, bias=False, nonlinearity=nonlinearity),
        Case(3, None, 2, 5, nonlinearity=nonlinearity, hx=False),
    ):
        module = case.module(truncation=k)
        x, h = case.data()

        def call(data, *rest, case=case, module=module, x=x):
            # The rest are the parameters themselves: gradcheck moves them in place.
            input = PackedSequence(data, *x[1:]) if case.lengths else data
            output, h_n = module(input, rest[0] if case.hx else None)
            return output.data if case.lengths else output, h_n

        leaves = [t.requires_grad_() for t in (x.data, h) if t is not None]
        assert torch.autograd.gradcheck(call, [*leaves, *module.parameters()])


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "identity"])
@pytest.mark.parametrize("k", [None, 4], ids="k={}".format)
@pytest.mark.parametrize("B", [None, 1, 3], ids="B={}".format)
def test_gradcheck_functional(B, k, nonlinearity):
    torch.manual_seed(0)
    batch = () if B is None else (B,)
    shapes = [(4, *batch, 2), (*batch, 3), (3, 2), (3, 3), (3,), (3,)]
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def call(*arguments):
        return fastbptt.rnn(*arguments, nonlinearity=nonlinearity, truncation=k)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradcheck(call, leaves[:4])  # no biases
    assert torch.autograd.gradcheck(lambda x, *w: call(x, None, *w), [leaves[0], *leaves[2:]])


def clear_of_the_kink(case: Case, k: int | None = None) -> Case:
    """The case with the first seed that keeps every relu's argument 1e-6 away from zero.

    On the kink's other side the derivative is another, so there rounding alone would decide.
    """
    for seed in range(100):
        case = dataclasses.replace(case, seed=seed)
        module, _ = referee(case.module())
        x, h0 = (t.double() for t in case.data())
        states = torch.cat([h0, fastbptt.reference.run(module, x, h0)[0][:-1]])
        w_ih, w_hh, b_ih, b_hh = module.parameters()
        if (x @ w_ih.T + b_ih + states @ w_hh.T + b_hh).abs().min() > 1e-6:
            return case
    raise AssertionError(f"no seed for {case}")


def check(case: Case, k: int | None = None) -> None:
    module = case.module(truncation=k)
    actual = step(module, *case.data())
    if case.nonlinearity == "identity":  # torch has no such module: its operators in a loop
        other = case.module()

        def call(x, h):
            return fastbptt.reference.run(other, x, h, truncation=k)
    else:
        other = twin(module)
        call = detach_loop(other, k) if k else other
    peer = step(other, *case.data(), call=call)
    double, call = referee(module, k)
    assert_as_exact(actual, peer, step(double, *case.data(), call=call))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_error(shape, isa, threads):
    case = Case(*shape, dtype=torch.float32)
    check(case)
    check(case, k=4)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES[:12], ids=str)
@pytest.mark.parametrize("nonlinearity", ["relu", "identity"])
def test_float32_error_of_other_nonlinearities(nonlinearity, shape, isa):
    case = Case(*shape, nonlinearity=nonlinearity, dtype=torch.float32)
    if nonlinearity == "relu":
        case = clear_of_the_kink(case)
    check(case)
    check(case, k=4)


@pytest.mark.usefixtures("poisoned")
def test_float32_error_of_stacks(isa):
    check(Case(9, 5, 6, 40, 3, True, dtype=torch.float32))
    check(Case(9, 5, 6, 40, 2, True, lengths=(9, 2, 5, 5, 1), dtype=torch.float32))
    check(Case(9, 5, 6, 40, 3, batch_first=True, dtype=torch.float32), k=4)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh(dtype, isa):
    """The activation by itself, over its whole range: pre = 1 x + 0 h.

    Relative to the value itself, small ones included. libm's is good to 1 eps, so this is the rule
    of twice torch's own error.
    """
    tiny, eps = torch.finfo(dtype).tiny, torch.finfo(dtype).eps
    near_zero = torch.logspace(-37, 0, 4000, dtype=torch.float64)
    x = torch.cat([near_zero, torch.linspace(0, 30, 20001, dtype=torch.float64)])
    far = torch.tensor([88.0, 89.0, 1e4, 1e30, float("inf")], dtype=torch.float64)
    x = torch.cat([x, far])
    x = torch.cat([-x, x]).to(dtype)
    one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    exact = torch.tanh(x.double())
    limit = 2 * eps * exact.abs() + tiny
    for shape in [(x.numel(), 1, 1), (1, x.numel(), 1)]:  # one row at a time, and all at once
        got = fastbptt.rnn(x.view(shape), None, one, zero)[0].flatten()
        error = (got.double() - exact).abs()
        worst = (error / limit).argmax()
        assert (error <= limit).all(), f"tanh({x[worst]:.9g}) is {got[worst]:.9g}"
        assert (got.abs() <= 1).all()
