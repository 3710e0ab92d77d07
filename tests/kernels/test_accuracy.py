"""How exact: finite differences in float64, and float32's error against torch's own."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

import fastbptt
from common import (
    CELLS,
    SHAPES,
    Case,
    Results,
    assert_as_exact,
    detach_loop,
    once,
    parts,
    referee,
    step,
    tensors_of,
    twin,
    whole,
)

# A truncated gradient is the derivative of no function, so finite differences say nothing of it;
# test_truncation holds it against loops that detach. k >= T truncates nothing: it is checked here.


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("lengths", [None, (3, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("k", [None, 3], ids="k={}".format)
def test_gradcheck_module(k, lengths, cell):
    for case in (
        Case(3, 2, 2, 2, 2, True, lengths=lengths, cell=cell),
        Case(3, 2, 2, 3, 2, batch_first=True, bias=False, cell=cell, proj=2 * (cell == "lstm")),
        Case(3, None, 2, 5, cell=cell, hx=False),
    ):
        module = case.module(truncation=k)
        x, hx = case.data()

        def call(data, *rest, case=case, module=module, x=x, hx=hx):
            # Behind the states come the parameters themselves: gradcheck moves them in place.
            input = PackedSequence(data, *x[1:]) if case.lengths else data
            return tensors_of(module(input, whole(rest[: len(parts(hx))])))

        leaves = [t.requires_grad_() for t in (x.data, *parts(hx))]
        assert torch.autograd.gradcheck(call, [*leaves, *module.parameters()])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("k", [None, 4], ids="k={}".format)
@pytest.mark.parametrize("B", [None, 1, 3], ids="B={}".format)
def test_gradcheck_functional(B, k, cell):
    torch.manual_seed(0)
    batch = () if B is None else (B,)
    G = {"gru": 3, "lstm": 4}.get(cell, 1)
    states = [(*batch, 3)] * (2 if cell == "lstm" else 1)
    shapes = [(4, *batch, 2), *states, (G * 3, 2), (G * 3, 3), (G * 3,), (G * 3,)]
    x, *rest = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    states, weights = rest[: len(states)], rest[len(states) :]
    run = getattr(fastbptt, cell, partial(fastbptt.rnn, nonlinearity=cell))

    def call(x, *rest):
        hx, weights = whole(rest[: len(states)]), rest[len(states) :]
        return tensors_of(run(x, hx, *weights, truncation=k))

    def call_from_zeros(x, *weights):
        return tensors_of(run(x, None, *weights, truncation=k))

    assert torch.autograd.gradcheck(call, [x, *states, *weights])
    assert torch.autograd.gradcheck(call, [x, *states, *weights[:2]])  # no biases
    assert torch.autograd.gradcheck(call_from_zeros, [x, *weights])


@once
def clear_of_the_kink(case: Case) -> Case:
    """The case with the next seed that keeps every relu's argument 1e-6 away from zero.

    On the kink's other side the derivative is another, so there rounding alone would decide.
    """
    for seed in range(case.seed, case.seed + 100):
        case = dataclasses.replace(case, seed=seed)
        module, _ = referee(case.module())
        x, h0 = (t.double() for t in case.data())
        states = torch.cat([h0, fastbptt.reference.run(module, x, h0)[0][:-1]])
        w_ih, w_hh, b_ih, b_hh = module.parameters()
        if (x @ w_ih.T + b_ih + states @ w_hh.T + b_hh).abs().min() > 1e-6:
            return case
    raise AssertionError(f"no seed for {case}")


@once
def peer_and_truth(case: Case, k: int | None) -> tuple[Results, Results]:
    """torch's results, and the float64 reference's."""
    if case.cell == "identity":  # torch has no such module: its operators in a loop
        other = case.module()
        call = partial(fastbptt.reference.run, other, truncation=k)
    else:
        other = twin(case.module())
        call = detach_loop(other, k) if k else other
    peer = step(other, *case.data(), call=call)
    double, call = referee(case.module(), k)
    return peer, step(double, *case.data(), call=call)


def check(case: Case, k: int | None = None) -> None:
    """The error of a few numbers is luck, so that of a small case is taken over many seeds."""
    results = []
    for seed in range(32 if case.T * case.B * case.H < 100 else 1):
        case = dataclasses.replace(case, seed=100 * seed)
        seeded = clear_of_the_kink(case) if case.cell == "relu" else case
        actual = step(seeded.module(truncation=k), *seeded.data())
        results.append((actual, *peer_and_truth(seeded, k)))
    stacked = (
        {name: torch.stack([result[name] for result in of_all]) for name in of_all[0]}
        for of_all in zip(*results, strict=True)
    )
    assert_as_exact(*stacked)


@pytest.mark.slow(15)
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_error(shape, cell, isa, threads):
    case = Case(*shape, cell=cell, dtype=torch.float32)
    check(case)
    check(case, k=4)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES[:12], ids=str)
@pytest.mark.parametrize("cell", ["relu", "identity"])
def test_float32_error_of_other_nonlinearities(cell, shape, isa):
    case = Case(*shape, cell=cell, dtype=torch.float32)
    check(case)
    check(case, k=4)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cell, proj", [("tanh", 0), ("gru", 0), ("lstm", 0), ("lstm", 24)])
def test_float32_error_of_stacks(cell, proj, isa):
    case = partial(Case, 9, 5, 6, 40, cell=cell, proj=proj, dtype=torch.float32)
    check(case(layers=3, bidirectional=True))
    check(case(layers=2, bidirectional=True, lengths=(9, 2, 5, 5, 1)))
    check(case(layers=3, batch_first=True), k=4)


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


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_sigmoid(cell, dtype, isa):
    """The gates' activation by itself: a GRU's h = z h_0 with h_0 = 1, an LSTM's c = f c_0."""
    tiny, eps = torch.finfo(dtype).tiny, torch.finfo(dtype).eps
    near_zero = torch.logspace(-37, 0, 4000, dtype=torch.float64)
    x = torch.cat([near_zero, torch.linspace(0, 80, 40001, dtype=torch.float64)])
    far = torch.tensor([88.0, 89.0, 1e4, 1e30], dtype=torch.float64)  # inf times 0 would be NaN
    x = torch.cat([-far, -x, x, far]).to(dtype)
    exact = torch.sigmoid(x.double())
    limit = 2 * eps * exact + tiny
    gates = 3 if cell == "gru" else 4
    weight_ih, weight_hh = torch.zeros(gates, 1, dtype=dtype), torch.zeros(gates, 1, dtype=dtype)
    weight_ih[1] = 1  # z of r, z, n, and f of i, f, g, o
    one = torch.ones(x.numel(), 1, dtype=dtype)
    if cell == "gru":
        _, got = fastbptt.gru(x.view(1, -1, 1), one, weight_ih, weight_hh)
    else:
        _, (_, got) = fastbptt.lstm(x.view(1, -1, 1), (0 * one, one), weight_ih, weight_hh)
    got = got.flatten()
    error = (got.double() - exact).abs()
    worst = (error / limit).argmax()
    assert (error <= limit).all(), f"sigmoid({x[worst]:.9g}) is {got[worst]:.9g}"
    assert (got >= 0).all() and (got <= 1).all()
