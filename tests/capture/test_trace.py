"""torch.jit.trace: one operator in the trace, eager's outputs and gradients at other shapes too."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastbptt
from common import Case, assert_matches, step, tensors_of, twin

# That it is deprecated is no concern of the tests.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

CASES = [
    Case(cell="tanh"),
    Case(cell="relu", hx=False, batch_first=True),
    Case(cell="identity", layers=2, bias=False),
    Case(cell="gru", layers=2, bidirectional=True, hx=False),
    Case(cell="gru", B=None),
    Case(cell="lstm", layers=2, batch_first=True),
    Case(cell="lstm", proj=2, bidirectional=True),
    Case(cell="lstm", hx=False, dtype=torch.float32),
]


def trace(module: nn.Module, *arguments) -> torch.jit.ScriptModule:
    return torch.jit.trace(module, tuple(a for a in arguments if a is not None))


def operators(traced: torch.jit.ScriptModule) -> list[str]:
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    return [kind for kind in kinds if kind.startswith("fastbptt::")]


def longer(case: Case) -> Case:
    return Case(**{**vars(case), "T": 8, "B": None if case.B is None else 4, "seed": 5})


@pytest.mark.parametrize("truncation", [None, 2], ids="truncation={}".format)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_eager_at_another_shape(case, truncation):
    module = case.module(truncation=truncation)
    traced = trace(module, *case.data())
    assert operators(traced) == ["fastbptt::network"]
    other = longer(case)
    x, hx = other.data()

    def call(x, hx=None):
        return traced(x) if hx is None else traced(x, hx)

    expected = step(module, x, hx)
    for _ in range(3):  # the executor compiles once it has seen a call or two
        assert_matches(step(module, x, hx, call=call), expected, rtol=0)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_traced_with_and_without_gradients(with_gradients):
    """What the trace holds does not depend on the grad mode in which it was made."""
    case = Case(cell="gru")
    module, (x, hx) = case.module(), case.data()
    with torch.set_grad_enabled(with_gradients):
        traced = trace(module, x, hx)
    assert_matches(step(module, x, hx, call=traced), step(module, x, hx), rtol=0)


@pytest.mark.parametrize(
    "truncation",
    [fastbptt.TBPTT(2, 3), fastbptt.Sliding(2), fastbptt.Gated(torch.tensor([1, 0.5, 0, 2, 1]))],
    ids=str,
)
def test_truncations(truncation):
    case = Case(cell="lstm", layers=2)
    module, (x, hx) = case.module(truncation=truncation), case.data()
    traced = trace(module, x, hx)
    assert_matches(step(module, x, hx, call=traced), step(module, x, hx), rtol=0)


@pytest.mark.parametrize("options", [{"pi": 0.5}, {"mean_length": 2.5}], ids=str)
def test_randomized(options):
    """Every call of the trace draws anew, as every call of the module."""
    case = Case(cell="gru", T=40)
    module, (x, hx) = case.module(truncation=fastbptt.Randomized(**options)), case.data()
    traced = trace(module, x, hx)
    results = [step(module, x, hx, call=traced) for _ in range(2)]
    assert torch.equal(results[0]["output"], module(x, hx)[0])
    assert not torch.equal(results[0]["dinput"], results[1]["dinput"])


class WithResets(nn.Module):
    def __init__(self, rnn: nn.RNNBase):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, resets):
        return self.rnn(x, resets=resets)[0]


def test_resets_at_another_shape():
    net = WithResets(Case(cell="lstm", batch_first=True).module(truncation=2))

    def arguments(B, T):
        return torch.randn(B, T, 3, dtype=torch.float64), torch.rand(B, T) < 0.4

    traced = trace(net, *arguments(2, 5))
    x, resets = arguments(3, 9)
    assert torch.equal(traced(x, resets), net(x, resets))


class Net(nn.Module):
    """A net that packs what it is given, and reads the last state."""

    def __init__(self, rnn: nn.RNNBase):
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x.tanh(), lengths, enforce_sorted=False)
        output, states = self.rnn(packed)
        last = states[0] if isinstance(states, tuple) else states
        return pad_packed_sequence(output)[0], self.head(last[-1])


@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_packed_inside_a_net(cell):
    net = Net(Case(cell=cell).module(truncation=2))
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    traced = torch.jit.trace(net, (x, torch.tensor([2, 5, 3])))
    assert operators(traced) == ["fastbptt::network"]
    x, lengths = torch.randn(7, 3, 3, dtype=torch.float64), torch.tensor([7, 1, 4])
    for a, b in zip(traced(x, lengths), net(x, lengths), strict=True):
        assert torch.equal(a, b)


def test_the_traced_module_trains_and_is_saved(tmp_path):
    """The same weights as by training eagerly; a saved trace goes on where it was."""
    modules = [nn.Sequential(Case(cell="gru").module(truncation=2)) for _ in range(2)]
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    for index, module in enumerate(modules):
        forward = torch.jit.trace(module, (x,)) if index == 0 else module
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            tensors_of(forward(x))[0].square().sum().backward()
            optimizer.step()
        if index == 0:
            torch.jit.save(forward, tmp_path / "traced.pt")
    assert_matches(modules[0].state_dict(), modules[1].state_dict(), rtol=0)
    loaded = torch.jit.load(tmp_path / "traced.pt")
    for a, b in zip(tensors_of(loaded(x)), tensors_of(modules[1](x)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("hx", [True, False], ids="hx={}".format)
@pytest.mark.parametrize("cell", ["tanh", "gru", "lstm"])
def test_no_more_warnings_than_torchs(cell, hx):
    case = Case(cell=cell, hx=hx)
    module, counts = case.module(truncation=2), []
    for each in (module, twin(module)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", torch.jit.TracerWarning)
            trace(each, *case.data())
        counts.append(sum(w.category is torch.jit.TracerWarning for w in caught))
    assert counts[0] <= counts[1]


def test_tensorboards_graph(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", exc_type=ImportError)
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(fastbptt.LSTM(3, 4), torch.randn(5, 2, 3))
    (events,) = tmp_path.iterdir()
    assert b"fastbptt::network" in events.read_bytes()
