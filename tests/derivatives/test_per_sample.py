"""Gradients of weights by sequence, against one backward pass for each sequence."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import fastbptt
from fastbptt import TBPTT, Chunked, Sliding, _transformed, call
from fastbptt._derivatives import Network
from fastbptt._per_sample import by_sequence

I, H = 3, 4
LENGTHS = {
    "padded": (6, 6, 6),
    "each of its own length": (7, 4, 2),
    "several of a length": (6, 4, 4, 4, 1, 1),
    "one": (6,),
}
TRUNCATIONS = [
    None,
    Chunked(2),
    TBPTT(2, 5),
    TBPTT(2, 2, loss="last"),
    TBPTT(2, 3, loss="last"),
    Sliding(3),
]
CELLS = {
    "rnn": fastbptt.RNN,
    "gru": fastbptt.GRU,
    "lstm": fastbptt.LSTM,
    "projected": partial(fastbptt.LSTM, proj_size=2),
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def point_of(module, input, resets):
    """Where a call of a module is, and its results."""
    module._run_call = partial(call.run, network=_transformed.network)
    output, states = module(input, resets=resets)
    del module._run_call
    output = output if isinstance(output, torch.Tensor) else output.data
    states = states if isinstance(states, tuple) else (states,)
    return Network.point(output.grad_fn), (output, *states)


def random_like(results):
    grads = [torch.randn_like(each) for each in results]
    return grads, [*grads, None][:3]


def rows_of(lengths, b):
    """Of sequence b in a packed batch."""
    return [sum(min(n, t) for n in lengths) + b for t in range(lengths[b])]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
def test_packed(cell, lengths, truncation):
    overlaps = truncation is not None and truncation.k2 > truncation.k1
    module = CELLS[cell](I, H, 2, bidirectional=not overlaps, truncation=truncation)
    sequences = [torch.randn(length, I) for length in lengths]
    resets = torch.rand(max(lengths), len(lengths)) < 0.2
    input = pack_sequence(sequences)
    input = input._replace(data=input.data.requires_grad_())
    point, results = point_of(module, input, resets)
    given, grads = random_like(results)
    needs = [True, False, False, *[True] * point.net.num_weights]
    of_input, hx, cx, *of_weights = by_sequence(point, grads, needs)
    assert hx is None and cx is None
    for b, sequence in enumerate(sequences):
        x = sequence[:, None].requires_grad_()
        output, states = module(x, resets=resets[: len(x), b : b + 1])
        states = states if isinstance(states, tuple) else (states,)
        rows = rows_of(lengths, b)
        ours = [given[0][rows, None], *(g[:, b : b + 1] for g in given[1:])]
        of_x, *expected = torch.autograd.grad((output, *states), (x, *module.parameters()), ours)
        torch.testing.assert_close(of_input[rows, None], of_x, rtol=1e-10, atol=1e-12)
        for found, one in zip(of_weights, expected, strict=True):
            torch.testing.assert_close(found[b], one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("lengths", [None, (6, 6, 3, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("needs_input", [True, False])
def test_sums(cell, lengths, needs_input):
    """Together they are the gradients, dropout's mask between the layers and all."""
    module = CELLS[cell](I, H, 3, dropout=0.4, bidirectional=True, batch_first=lengths is None)
    if lengths is None:
        x = input = torch.randn(4, 6, I, requires_grad=True)
    else:
        input = pack_sequence([torch.randn(length, I) for length in lengths])
        x = input.data.requires_grad_()
        input = input._replace(data=x)
    point, results = point_of(module, input, None)
    assert len(point.masks) == 2
    given, grads = random_like(results)
    needs = [needs_input, False, False, *[True] * point.net.num_weights]
    of_input, _, _, *of_weights = by_sequence(point, grads, needs)
    of_x, *expected = torch.autograd.grad(results, (x, *module.parameters()), given)
    assert (of_input is not None) == needs_input
    if needs_input:
        torch.testing.assert_close(of_input, of_x, rtol=1e-10, atol=1e-12)
    for found, one in zip(of_weights, expected, strict=True):
        assert found.shape == (4, *one.shape)
        torch.testing.assert_close(found.sum(0), one, rtol=1e-10, atol=1e-12)


def test_an_empty_batch():
    module = fastbptt.GRU(I, H, 2)
    point, results = point_of(module, torch.randn(5, 0, I), None)
    _, grads = random_like(results)
    *_, last = by_sequence(point, grads, [False] * 3 + [True] * 8)
    assert last.shape == (0, 3 * H)
