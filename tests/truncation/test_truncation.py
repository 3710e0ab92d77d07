"""Chunked(k) against what a user would write by hand: a loop that detaches the state."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastbptt
from common import (
    CELLS,
    Case,
    Results,
    assert_matches,
    detach_loop,
    once,
    parts,
    referee,
    step,
    tensors_of,
    twin,
    whole,
)
from fastbptt import Chunked

pytestmark = pytest.mark.usefixtures("poisoned")

BOOLS = (False, True)


def detach_loop_by_layer(module: torch.nn.RNNBase, k: int):
    """The same for both directions: chunks with the same boundaries, walked from either end."""
    if module.mode == "LSTM":
        run = torch.lstm
    else:
        run = torch.gru if module.mode == "GRU" else torch.rnn_tanh

    def direction(chunks: list[Tensor], states: tuple[Tensor, ...], weights: list[Tensor]):
        outputs, states = [], [state[None] for state in states]
        for i, chunk in enumerate(chunks):
            if i > 0:
                states = [state.detach() for state in states]
            hx = tuple(states) if run is torch.lstm else states[0]
            output, *states = run(chunk, hx, weights, True, 1, 0.0, False, False, False)
            outputs.append(output)
        return outputs, states

    def call(x: Tensor, hx: Tensor | tuple[Tensor, Tensor]):
        finals = []
        for layer in range(module.num_layers):
            there, back = module.all_weights[2 * layer : 2 * layer + 2]
            initial = [[state[2 * layer + i] for state in parts(hx)] for i in (0, 1)]
            ahead, last = direction(x.split(k), initial[0], there)
            finals.append(last)
            last_first = [chunk.flip(0) for chunk in reversed(x.split(k))]
            behind, last = direction(last_first, initial[1], back)
            finals.append(last)
            x = torch.cat([torch.cat(ahead), torch.cat(behind).flip(0)], dim=-1)
        return x, whole([torch.cat(of_all) for of_all in zip(*finals, strict=True)])

    return call


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 8, 9])  # T = 8
@pytest.mark.parametrize(
    "cell, proj", [("tanh", 0), ("relu", 0), ("gru", 0), ("lstm", 0), ("lstm", 2)]
)
@pytest.mark.parametrize("layers", [1, 3], ids="layers={}".format)
def test_detach_loop(layers, cell, proj, k):
    for B in (None, 3):
        for batch_first in BOOLS:
            for hx in BOOLS:
                case = Case(8, B, 3, 5, layers, batch_first=batch_first, hx=hx)
                case = dataclasses.replace(case, cell=cell, proj=proj)
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


@once
def by_detach_loop(case: Case, k: int) -> Results:
    other = twin(case.module())
    return step(other, *case.data(), call=detach_loop(other, k))


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_detach_loop_shapes(shape, cell, isa, threads):
    *sizes, k = shape
    case = Case(*sizes, cell=cell)
    actual = step(case.module(truncation=k), *case.data())
    assert_matches(actual, by_detach_loop(case, k))


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])  # T = 7 and 6: with and without a short chunk
@pytest.mark.parametrize("layers", [1, 2], ids="layers={}".format)
@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_both_directions(cell, layers, k):
    for T in (6, 7):
        case = Case(T, 3, 4, 5, layers, bidirectional=True, cell=cell)
        other = twin(case.module())
        actual = step(case.module(truncation=k), *case.data())
        assert_matches(actual, step(other, *case.data(), call=detach_loop_by_layer(other, k)))


@pytest.mark.parametrize("lengths", [(7, 7, 4, 3, 1), (3, 7, 1, 6)], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("k", [1, 2, 3, 7])
@pytest.mark.parametrize("bidirectional", BOOLS, ids="bidirectional={}".format)
@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_packed_is_each_sequence_alone(cell, bidirectional, k, lengths):
    case = Case(max(lengths), len(lengths), 4, 5, 2, bidirectional, cell=cell)
    module, other = case.module(truncation=k), twin(case.module())
    x, hx = case.data()
    leaves = [t.requires_grad_() for t in (x, *parts(hx))]

    def gradients(loss: Tensor, module) -> dict[str, Tensor]:
        names = [*("dinput", "dhx", "dcx")[: len(leaves)], *dict(module.named_parameters())]
        grads = torch.autograd.grad(loss, [*leaves, *module.parameters()])
        return dict(zip(names, grads, strict=True))

    def loss_of(output: Tensor, last) -> Tensor:
        # Padding, being zero, adds nothing.
        return output.sin().sum() + sum(state.square().sum() for state in parts(last))

    output, last = module(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
    loss = loss_of(pad_packed_sequence(output)[0], last)
    actual = gradients(loss, module)

    call = (detach_loop_by_layer if bidirectional else detach_loop)(other, k)
    alone = 0
    for b, n in enumerate(lengths):
        states = whole([state[:, b : b + 1] for state in parts(hx)])
        alone = alone + loss_of(*call(x[:n, b : b + 1], states))
    torch.testing.assert_close(loss, alone, rtol=1e-12, atol=0)
    assert_matches(actual, gradients(alone, other))


@pytest.mark.parametrize("bidirectional", BOOLS, ids="bidirectional={}".format)
@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_long_chunks_are_full_backpropagation(cell, bidirectional, isa, threads):
    for lengths in (None, (9, 2, 5)):
        case = Case(9, 3, 4, 37, 2, bidirectional, cell=cell, lengths=lengths)
        full = step(case.module(), *case.data())
        for k in (9, 10, 2**31, 2**62):
            assert_matches(step(case.module(truncation=k), *case.data()), full)


@pytest.mark.parametrize("cell", CELLS)
def test_state_before_gets_the_first_chunk_alone(cell):
    case = Case(8, 2, 3, 5, cell=cell)
    module = case.module(truncation=4)
    x, hx = case.data()
    for t, reached in [(0, True), (3, True), (4, False), (7, False)]:
        for state in parts(hx):
            state.requires_grad_().grad = None
        module(x, hx)[0][t].sum().backward()
        for state in parts(hx):
            assert state.grad.any().item() is reached, f"t = {t}"


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
@pytest.mark.parametrize("truncation", [None, 1, 3, Chunked(3)], ids=str)
def test_outputs_do_not_depend_on_it(truncation, cell):
    for bidirectional in BOOLS:
        case = Case(7, 3, 4, 5, 2, bidirectional, cell=cell)
        full = tensors_of(case.module()(*case.data()))
        truncated = tensors_of(case.module(truncation=truncation)(*case.data()))
        assert all(torch.equal(a, b) for a, b in zip(full, truncated, strict=True))


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_the_call_overrides_the_module(cell):
    case = Case(8, 3, 4, 5, cell=cell)
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


@pytest.mark.parametrize("cell, proj", [*((cell, 0) for cell in CELLS), ("lstm", 2)])
@pytest.mark.parametrize("bias", BOOLS, ids="bias={}".format)
def test_functional_like_the_module(bias, cell, proj):
    for B, hx in itertools.product((3, None), BOOLS):
        case = Case(8, B, 4, 5, bias=bias, cell=cell, proj=proj, hx=hx)
        module = case.module()
        expected = step(module, *case.data(), call=partial(module, truncation=3))
        actual = step(module, *case.data(), call=functional(fastbptt, case, module))
        assert_matches(actual, expected)
        truth = step(module, *case.data(), call=functional(fastbptt.reference, case, module))
        assert_matches(actual, truth)


def functional(namespace, case: Case, module):
    """A call of the namespace's function for one layer, with shapes as the module has them."""
    weights = {name.removesuffix("_l0"): p for name, p in module.named_parameters()}
    if case.cell in ("gru", "lstm"):
        run = partial(getattr(namespace, case.cell), truncation=3, **weights)
    else:
        run = partial(namespace.rnn, nonlinearity=case.cell, truncation=3, **weights)

    def call(x: Tensor, hx=None):
        output, last = run(x, whole([state[0] for state in parts(hx)]))
        return output, whole([state[None] for state in parts(last)])

    return call


# Finite differences cannot check a truncated gradient: it is the derivative of no function (the
# outputs depend on all the past), which is the point of truncation. The reference's detach is
# what it is checked against, and the reference is checked against the loops above.
@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("cell", CELLS)
def test_reference(cell, k):
    case = Case(7, 3, 4, 5, 2, bidirectional=True, cell=cell)
    module = case.module(truncation=k)
    actual = step(module, *case.data())
    double, call = referee(module, k)
    assert_matches(actual, step(double, *case.data(), call=call))
    if cell in ("tanh", "gru", "lstm"):  # those that torch's operators have
        by_hand = step(double, *case.data(), call=detach_loop_by_layer(double, k))
        assert_matches(actual, by_hand)


def test_values():
    assert fastbptt.RNN(2, 3, truncation=4).truncation == Chunked(4)
    assert fastbptt.RNN(2, 3).truncation is None
    assert Chunked(4) == Chunked(4) != Chunked(5)
    assert hash(Chunked(4)) == hash(Chunked(4)) and repr(Chunked(4)) == "Chunked(k=4)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        Chunked(4).k = 5
