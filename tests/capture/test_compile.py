"""torch.compile of a training step, without a graph break, equals eager."""

from __future__ import annotations

import copy

import pytest
import torch

import fastbptt
from common import assert_matches, parts, whole

# inductor may order the sums of the loss around our operators in its own way: to rounding.
RTOL = 1e-12


class Model(torch.nn.Module):
    def __init__(self, cls: type = fastbptt.RNN, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = cls(3, 8, dtype=torch.float64, **options)
        width = (self.rnn.proj_size or 8) * (2 if self.rnn.bidirectional else 1)
        self.head = torch.nn.Linear(width, 2, dtype=torch.float64)

    def forward(self, x, hx):
        output, hx = self.rnn(x.tanh(), hx)
        last = hx[1] if isinstance(hx, tuple) else hx
        return self.head(output).square().mean() + last.sum(), hx

    def initial(self):
        count = self.rnn.num_layers * (2 if self.rnn.bidirectional else 1)
        sizes = [self.rnn.proj_size or 8] + [8] * isinstance(self.rnn, fastbptt.LSTM)
        return whole([torch.zeros(count, 4, size, dtype=torch.float64) for size in sizes])


def train(model, forward, lengths=(5, 5, 5)):
    """Three steps, the states carried and detached in between: parameters, losses, states."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hx = model.initial()
    generator = torch.Generator().manual_seed(1)
    losses = []
    for T in lengths:
        shape = (4, T, 3) if model.rnn.batch_first else (T, 4, 3)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        optimizer.zero_grad()
        loss, hx = forward(x, whole([state.detach() for state in parts(hx)]))
        loss.backward()
        optimizer.step()
        losses += [loss.detach(), x.grad]
    results = {n: p.detach() for n, p in model.named_parameters()}
    results |= {f"state {i}": state.detach() for i, state in enumerate(parts(hx))}
    return results | {f"loss and dx {i}": value for i, value in enumerate(losses)}


OPTIONS = [
    {},
    {"truncation": 2},
    {"num_layers": 2, "bidirectional": True, "truncation": 3},
    {"batch_first": True, "bias": False, "nonlinearity": "relu", "num_layers": 2},
    {"cls": fastbptt.GRU, "num_layers": 2, "bidirectional": True, "truncation": 3},
    {"cls": fastbptt.GRU, "batch_first": True, "bias": False, "recompute": True},
    {"cls": fastbptt.LSTM, "truncation": 2},
    {"cls": fastbptt.LSTM, "num_layers": 2, "bidirectional": True, "proj_size": 5},
    {"cls": fastbptt.LSTM, "batch_first": True, "bias": False, "recompute": True},
    {"truncation": fastbptt.TBPTT(2, 4), "batch_first": True},
    {"cls": fastbptt.GRU, "num_layers": 2, "truncation": fastbptt.Sliding(3)},
    {"cls": fastbptt.LSTM, "num_layers": 2, "truncation": fastbptt.TBPTT(2, 2, "last")},
]


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch, tmp_path):
    # torch's caches on disk know a graph by its operators' names, whatever these compute by now.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow(3)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_aot_eager(options):
    model = Model(**options)
    other = copy.deepcopy(model)
    expected = train(other, other)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_matches(train(model, compiled), expected, RTOL)


@pytest.mark.slow(1)
@pytest.mark.parametrize("cls", [fastbptt.RNN, fastbptt.GRU, fastbptt.LSTM])
@pytest.mark.parametrize("truncation", [None, 4], ids="truncation={}".format)
def test_lengths_that_change(truncation, cls):
    model = Model(cls, truncation=truncation)
    other = copy.deepcopy(model)
    lengths = (5, 9, 3, 12, 4)
    expected = train(other, other, lengths)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_matches(train(model, compiled, lengths), expected, RTOL)


def test_functional_with_the_truncation_in_the_call():
    torch.manual_seed(0)
    shapes = [(6, 2, 3), (2, 4), (4, 3), (4, 4), (4,), (4,)]
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def loss(*arguments):
        output, h_n = fastbptt.rnn(*arguments, nonlinearity="relu", truncation=4)
        return output.square().sum() + h_n.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    pairs = zip(
        torch.autograd.grad(compiled(*leaves), leaves),
        torch.autograd.grad(loss(*leaves), leaves),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=RTOL, atol=0)


@pytest.mark.parametrize("truncation", [None, fastbptt.TBPTT(2, 3), "gates"], ids=str)
def test_resets_and_gates(truncation):
    if truncation == "gates":
        truncation = fastbptt.Gated(torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.3]))
    torch.manual_seed(0)
    rnn = fastbptt.LSTM(3, 4, 2, dtype=torch.float64)
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    resets = torch.rand(6, 2) < 0.3
    leaves = [x, *rnn.parameters()]

    def loss(x, resets):
        output, (h_n, c_n) = rnn(x, truncation=truncation, resets=resets)
        return output.square().sum() + h_n.sum() + c_n.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    pairs = zip(
        torch.autograd.grad(compiled(x, resets), leaves),
        torch.autograd.grad(loss(x, resets), leaves),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=RTOL, atol=0)


@pytest.mark.parametrize("cls", [fastbptt.RNN, fastbptt.GRU, fastbptt.LSTM])
def test_without_gradients(cls):
    model = Model(cls)
    x, hx = torch.randn(5, 4, 3, dtype=torch.float64), model.initial()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for a, b in zip(parts(compiled(x, hx)[1]), parts(model(x, hx)[1]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.slow(1)
@pytest.mark.parametrize("cls", [fastbptt.RNN, fastbptt.LSTM])
def test_inductor(cls):
    model = Model(cls, num_layers=2, truncation=2)
    other = copy.deepcopy(model)
    expected = train(other, other)
    compiled = torch.compile(model, fullgraph=True)
    assert_matches(train(model, compiled), expected, RTOL)
