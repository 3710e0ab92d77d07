"""Chunked(k) against what a user would write by hand: a loop that detaches the state."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastbptt
from common import Case, assert_matches, detach_loop, referee, step, twin
from fastbptt import Chunked

pytestmark = pytest.mark.usefixtures("poisoned")

BOOLS = (False, True)


def detach_loop_by_layer(module: torch.nn.RNN, k: int):
    """The same for both directions: chunks with the same boundaries, walked from either end."""

    def direction(chunks: list[Tensor], h: Tensor, suffix: str):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        weights = [getattr(module, name + suffix) for name in names]
        outputs, h = [], h[None]
        for i, chunk in enumerate(chunks):
            h = h.detach() if i > 0 else h
            output, h = torch.rnn_tanh(chunk, h, weights, True, 1, 0.0, False, False, False)
            outputs.append(output)
        return outputs, h[0]

    def call(x: Tensor, hx: Tensor):
        finals = []
        for layer in range(module.num_layers):
            outputs, h_n = direction(x.split(k), hx[2 * layer], f"_l{layer}")
            there = torch.cat(outputs)
            finals.append(h_n)
            last_first = [chunk.flip(0) for chunk in reversed(x.split(k))]
            outputs, h_n = direction(last_first, hx[2 * layer + 1], f"_l{layer}_reverse")
            back = torch.cat(outputs).flip(0)
            finals.append(h_n)
            x = torch.cat([there, back], dim=-1)
        return x, torch.stack(finals)

    return call


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 8, 9])  # T = 8
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("layers", [1, 3], ids="layers={}".format)
def test_detach_loop(layers, nonlinearity, k):
    for B in (None, 3):
        for batch_first in BOOLS:
            for hx in BOOLS:
                case = Case(8, B, 3, 5, layers, batch_first=batch_first, hx=hx)
                case = dataclasses.replace(case, nonlinearity=nonlinearity)
                module, other = case.module(truncation=k), twin(case.module())
                actual = step(module, *case.data())
                assert_matches(actual, step(other, *case.data(), call=detach_loop(other, k)))


# (T, B, I, H, k): lockstep over B * T / k rows, few and many; T not a multiple of k; k = 1.
SHAPES = [
    (1, 1, 1, 1, 1),
    (5, 1, 3, 1, 2),
    (13, 1, 5, 33, 4),
    (64, 1, 8, 64, 32),
    (65, 1, 8, 64, 32),
    (63, 5, 8, 17, 32),
    (10, 7, 6, 130, 3),
    (40, 13, 12, 96, 8),
    (97, 1, 4, 40, 1),
    (6, 2, 9, 384, 2),
    (50, 29, 3, 20, 49),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_detach_loop_shapes(shape, isa, threads):
    *sizes, k = shape
    case = Case(*sizes)
    other = twin(case.module())
    actual = step(case.module(truncation=k), *case.data())
    assert_matches(actual, step(other, *case.data(), call=detach_loop(other, k)))


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])  # T = 7 and 6: with and without a short chunk
@pytest.mark.parametrize("layers", [1, 2], ids="layers={}".format)
def test_both_directions(layers, k):
    for T in (6, 7):
        case = Case(T, 3, 4, 5, layers, bidirectional=True)
        other = twin(case.module())
        actual = step(case.module(truncation=k), *case.data())
        assert_matches(actual, step(other, *case.data(), call=detach_loop_by_layer(other, k)))


@pytest.mark.parametrize("lengths", [(7, 7, 4, 3, 1), (3, 7, 1, 6)], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("k", [1, 2, 3, 7])
@pytest.mark.parametrize("bidirectional", BOOLS, ids="bidirectional={}".format)
def test_packed_is_each_sequence_alone(bidirectional, k, lengths):
    case = Case(max(lengths), len(lengths), 4, 5, 2, bidirectional)
    module, other = case.module(truncation=k), twin(case.module())
    x, h = (t.requires_grad_() for t in case.data())

    def gradients(loss: Tensor, weights) -> dict[str, Tensor]:
        names = ["dinput", "dhx", *dict(module.named_parameters())]
        return dict(zip(names, torch.autograd.grad(loss, [x, h, *weights]), strict=True))

    def loss_of(output: Tensor, h_n: Tensor) -> Tensor:
        return output.sin().sum() + h_n.square().sum()  # padding, being zero, adds nothing

    output, h_n = module(pack_padded_sequence(x, lengths, enforce_sorted=False), h)
    loss = loss_of(pad_packed_sequence(output)[0], h_n)
    actual = gradients(loss, module.parameters())

    call = (detach_loop_by_layer if bidirectional else detach_loop)(other, k)
    alone = [loss_of(*call(x[:n, b : b + 1], h[:, b : b + 1])) for b, n in enumerate(lengths)]
    torch.testing.assert_close(loss, sum(alone), rtol=1e-12, atol=0)
    assert_matches(actual, gradients(sum(alone), other.parameters()))


@pytest.mark.parametrize("bidirectional", BOOLS, ids="bidirectional={}".format)
def test_long_chunks_are_full_backpropagation(bidirectional, isa, threads):
    for lengths in (None, (9, 2, 5)):
        case = Case(9, 3, 4, 37, 2, bidirectional, lengths=lengths)
        full = step(case.module(), *case.data())
        for k in (9, 10, 2**31, 2**62):
            assert_matches(step(case.module(truncation=k), *case.data()), full)


def test_state_before_gets_the_first_chunk_alone():
    case = Case(8, 2, 3, 5)
    module = case.module(truncation=4)
    x, h = case.data()
    for t, reached in [(0, True), (3, True), (4, False), (7, False)]:
        h.requires_grad_().grad = None
        module(x, h)[0][t].sum().backward()
        assert h.grad.any().item() is reached, f"t = {t}"


@pytest.mark.parametrize("truncation", [None, 1, 3, Chunked(3)], ids=str)
def test_outputs_do_not_depend_on_it(truncation):
    for bidirectional in BOOLS:
        case = Case(7, 3, 4, 5, 2, bidirectional)
        output, h_n = case.module()(*case.data())
        truncated, h_n_truncated = case.module(truncation=truncation)(*case.data())
        assert torch.equal(output, truncated) and torch.equal(h_n, h_n_truncated)


def test_the_call_overrides_the_module():
    case = Case(8, 3, 4, 5)
    other = twin(case.module())
    full = step(other, *case.data())
    by = {k: step(other, *case.data(), call=detach_loop(other, k)) for k in (2, 3)}
    module = case.module(truncation=3)

    def run(**kwargs):
        return step(module, *case.data(), call=lambda x, h: module(x, h, **kwargs))

    assert_matches(run(), by[3])
    assert_matches(run(truncation=2), by[2])
    assert_matches(run(truncation=Chunked(2)), by[2])
    assert_matches(run(truncation=None), full)
    assert_matches(run(), by[3])  # a call leaves the module's own as it was
    assert module.truncation == Chunked(3)
    module.truncation = 2  # assigned as it is given to the constructor
    assert_matches(run(), by[2])
    module = case.module()
    assert_matches(run(truncation=2), by[2])
    assert_matches(run(), full)


def test_functional_like_the_module():
    case = Case(8, 3, 4, 5)
    module = case.module()
    expected = step(module, *case.data(), call=lambda x, h: module(x, h, truncation=3))

    def call(x: Tensor, h: Tensor):
        output, h_n = fastbptt.rnn(x, h[0], *module.parameters(), truncation=3)
        return output, h_n[None]

    assert_matches(step(module, *case.data(), call=call), expected)


# Finite differences cannot check a truncated gradient: it is the derivative of no function (the
# outputs depend on all the past), which is the point of truncation. The reference's detach is
# what it is checked against, and the reference is checked against the loops above.
@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "identity"])
def test_reference(nonlinearity, k):
    case = Case(7, 3, 4, 5, 2, bidirectional=True, nonlinearity=nonlinearity)
    module = case.module(truncation=k)
    actual = step(module, *case.data())
    double, call = referee(module, k)
    assert_matches(actual, step(double, *case.data(), call=call))
    if nonlinearity == "tanh":
        by_hand = step(double, *case.data(), call=detach_loop_by_layer(double, k))
        assert_matches(actual, by_hand)


def test_values():
    assert fastbptt.RNN(2, 3, truncation=4).truncation == Chunked(4)
    assert fastbptt.RNN(2, 3).truncation is None
    assert Chunked(4) == Chunked(4) != Chunked(5)
    assert hash(Chunked(4)) == hash(Chunked(4)) and repr(Chunked(4)) == "Chunked(k=4)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        Chunked(4).k = 5
